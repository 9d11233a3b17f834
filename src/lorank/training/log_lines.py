"""Lines in the log of a run, which a user sees without asking: what an allocation moved, and the summary at the end.

The logger is ``lorank``. Python shows only warnings of a logger that nobody has configured, so a run shows its lines
itself: on standard error, above progress bars, unless the user has configured the logger or the root logger. Fewer
lines: ``logging.getLogger("lorank").setLevel(logging.WARNING)`` before the run.
"""

from __future__ import annotations

import logging
import sys

from tqdm import tqdm  # a dependency of transformers

from lorank.training.history import Record
from lorank.training.summary import Summary, by_projection, count, moved, share

logger = logging.getLogger("lorank")

LINES = 20
"""The most lines about allocations in a run, but for the last: some methods move ranks at every tenth step."""
NAMED = 3
"""The number of projections on either side of the arrow."""


class _Console(logging.Handler):
    """Writes to standard error, above progress bars. Silent if the root logger has handlers, which get the same lines.

    Standard error is looked up for each line, because notebooks and tests replace it.
    """

    def emit(self, record: logging.LogRecord) -> None:
        if logging.getLogger().handlers or sys.stderr is None:
            return
        level = "" if record.levelno <= logging.INFO else f"{record.levelname.lower()}: "
        try:
            for line in self.format(record).splitlines() or [""]:
                tqdm.write(f"[lorank] {level}{line}", file=sys.stderr)
        except Exception:
            self.handleError(record)


def show_lines() -> None:
    """Lets the lines of a run appear, unless the user has decided about them. A second call changes nothing."""
    if logger.level == logging.NOTSET:
        logger.setLevel(logging.INFO)
    if not logger.handlers:
        logger.addHandler(_Console())


class AllocationLines:
    """Logs what the allocations of a run move: a line for each, or for several if there are many.

    Args:
        first: the first record of the run.
        total_steps: the number of optimiser steps of the whole run.
    """

    def __init__(self, first: Record, total_steps: int) -> None:
        self._shown, self._total_steps = first, total_steps
        self._moved, self._seconds = 0, 0.0

    def add(self, record: Record) -> None:
        """Logs an allocation, unless it moved nothing or follows too soon upon the last line."""
        self._moved += moved(record)
        self._seconds += record.seconds
        soon = record.step - self._shown.step < self._total_steps / LINES and record.step < self._total_steps
        if not self._moved or (soon and not self._shown.details.get("begins")):
            return
        used = "".join(f", {100 * share(amount):.1f} % of the budget" for amount in record.budget.values())
        logger.info(
            "step %d of %d: %s moved%s; %d ranks, %s parameters%s; %.1f s",
            record.step,
            self._total_steps,
            count(self._moved, "rank"),
            _where(self._shown, record),
            record.total_rank,
            f"{record.parameters:,}",
            used,
            self._seconds,
        )
        self._shown, self._moved, self._seconds = record, 0, 0.0


def log_summary(summary: Summary) -> None:
    """Logs the summary of a run, as one message of eight lines."""
    logger.info("%s", summary)


def _where(before: Record, after: Record) -> str:
    """Which projections lost and gained ranks, the largest changes first."""
    changes = by_projection({name: {"by": rank - before.ranks[name]} for name, rank in after.ranks.items()})
    ordered = sorted(((own["by"], name) for name, own in changes.items()), key=lambda one: -abs(one[0]))
    lost = [f"{name} −{-by}" for by, name in ordered if by < 0]
    gained = [f"{name} +{by}" for by, name in ordered if by > 0]
    if not lost and not gained:
        return " within their projections"
    sides = [", ".join([*side[:NAMED], *(["…"] if len(side) > NAMED else [])]) for side in (lost, gained)]
    return f": {' → '.join(side for side in sides if side)}"
