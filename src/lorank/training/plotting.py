"""The records of a history as the plain numbers that pictures are made of, and the picture of a run in Python."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeGuard

from lorank.errors import LorankError
from lorank.extras import require
from lorank.report.numbers import Frame, RunNumbers, Worth
from lorank.training.history import Record

if TYPE_CHECKING:
    import altair

TITLES = {"StaticLoRA": "LoRA", "ARDLoRA": "ARD-LoRA"}
"""Titles of methods, where the name of the class is not the title."""
SIMILAR = 1.25
"""Adapters whose parameters differ by at most this factor are compared module by module."""
_PROPORTIONAL = ("parameters", "percent", "percent_of_adapter")
"""Units of a budget that count parameters."""


def frames_of(records: Sequence[Record]) -> list[Frame]:
    """One frame per record."""
    return [
        Frame(
            record.step,
            dict(record.active) or dict(record.ranks),
            _stored(record),
            sum(map(len, record.pruned.values())),
            sum(record.added.values()),
            _limit(record),
            _heads(record),
        )
        for record in records
    ]


def worth_of(records: Sequence[Record]) -> Worth | None:
    """The scores of the last record that has any."""
    for record in reversed(records):
        if any(len(scores) for scores in record.scores.values()):
            return Worth(record.step, record.scores, record.pruned)
    return None


def numbers_of(records: Sequence[Record], *, name: str = "", made: Mapping[str, int] | None = None) -> RunNumbers:
    """A run's numbers, as far as its history knows them.

    Args:
        records: at least one.
        name: the run's name.
        made: per module, the rank with which the adapter was made, if known. Changes are counted from these ranks if
            the result has about as many parameters, as under a budget of that size; else from the start of the run.
    """
    frames, shapes = frames_of(records), records[-1].shapes
    reference, reference_name = frames[0].ranks, "the start of the run"
    if made is not None and shapes and set(made) == set(shapes):
        size = sum(rank * sum(shapes[name]) for name, rank in made.items())
        if frames[-1].parameters / SIMILAR <= size <= frames[-1].parameters * SIMILAR:
            reference, reference_name = made, "the adapter as it was made"
    method = TITLES.get(records[0].method, records[0].method)
    return RunNumbers(name, method, frames, reference, reference_name, worth_of(records))


def plot(
    records: Sequence[Record], *, show: Literal["rank", "change"] = "rank", made: Mapping[str, int] | None = None
) -> altair.Chart:
    """The heat map of ranks with a slider over the allocations, as a chart of Altair. A notebook shows it.

    Args:
        records: the history of a run (:attr:`Ranks.history`, or :func:`read_history`).
        show: "rank", or "change": the rank minus the one that :func:`numbers_of` counts from.
        made: see :func:`numbers_of`.

    Raises:
        MissingPackageError: altair is not installed.
        LorankError: there is no record; or `show` is something else.
    """
    require("plot()", "altair")
    if show not in ("rank", "change"):
        raise LorankError(f"show={show!r}: expected 'rank' or 'change'")
    if not records:
        raise LorankError("the history holds no record, so there is nothing to draw")
    from lorank.report.charts import themed
    from lorank.report.heatmap import slider_chart

    chart: altair.Chart = themed(slider_chart(numbers_of(records, made=made), show))
    return chart


def _limit(record: Record) -> float | None:
    """The numbers in A and B that the budget allowed, if it counts numbers. The tightest of several limits."""
    found = []
    budget = record.details.get("budget")
    for unit, amount in budget.items() if isinstance(budget, Mapping) else ():
        if unit in _PROPORTIONAL and isinstance(amount, Mapping):
            used, limit = amount.get("used"), amount.get("limit")
            if _is_number(used) and _is_number(limit) and used > 0:
                found.append(_stored(record) * limit / used)
    return min(found, default=None)


def _stored(record: Record) -> int:
    return record.parameters if record.shapes else 0


def _heads(record: Record) -> dict[str, list[int]]:
    """Per module, the ranks of its heads. What a stranger's file holds beside lists of whole numbers is left out."""
    found = record.details.get("head_ranks")
    return {
        name: ranks
        for name, ranks in (found.items() if isinstance(found, Mapping) else ())
        if name in record.ranks and isinstance(ranks, list) and ranks and all(_is_count(rank) for rank in ranks)
    }


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e100  # not NaN either


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 24
