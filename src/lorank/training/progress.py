"""A progress bar for scoring. It is shown on a terminal only, and removed when scoring is done."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Report = Callable[[int, int], None]
"""Called with (evaluations done, evaluations in total)."""


@contextmanager
def scoring_progress(label: str, shown: bool | Report | None = None) -> Iterator[Report | None]:
    """Yields a function to call with (evaluations done, evaluations in total), or None if nothing is shown.

    Args:
        label: the text beside the bar.
        shown: whether to show a bar; None: only if standard error is a terminal; a function: it is yielded, and no bar
            is shown.
    """
    if callable(shown):
        yield shown
        return
    if not (sys.stderr.isatty() if shown is None else shown):
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn(label), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(label, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
