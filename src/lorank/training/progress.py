"""A progress bar for scoring, on a terminal only. The bar disappears when scoring ends."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm  # a dependency of transformers

Report = Callable[[int, int], None]
"""Called with (evaluations done, evaluations in total)."""


@contextmanager
def scoring_progress(label: str, shown: bool | Report | None = None) -> Iterator[Report | None]:
    """Yields a function to call with (evaluations done, evaluations in total), or None if nothing is shown.

    Args:
        label: the text before the bar.
        shown: True: show a bar; False: show nothing; None: show a bar if standard error is a terminal; a function: call
            this function and show no bar.
    """
    if callable(shown):
        yield shown
        return
    if not (sys.stderr.isatty() if shown is None else shown):
        yield None
        return
    with tqdm(desc=label, leave=False, file=sys.stderr) as bar:

        def report(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield report
