"""What came out of a run, in eight lines: what moved, where to, what it cost.

It is computed from the history alone, so ``ranks.summary()``, the end of a run, ``lorank show`` and a notebook say the
same. This file has the words; nothing else puts a history into words.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from lorank.training.history import HistoryError, Record

NAMED = 3
"""The number of modules that a line names, of those that gained or lost most."""
UNITS = {
    "ranks_per_module": "{} ranks per module",
    "ranks": "{} ranks",
    "parameters": "{} parameters",
    "percent": "{} % of base",
    "percent_of_adapter": "{} % of adapter",
    "bytes": "{} bytes",
    "max_lora_rank": "a rank of at most {} in each module",
}
"""Amounts of a budget as text. A percentage always says of what."""


@dataclass(frozen=True)
class Summary:
    """What came out of a run. ``print`` shows it in eight lines, a notebook as a table.

    Attributes:
        rows: (what, text), eight of them.
        data: the same as numbers, JSON-serialisable: ``method``, ``step``, ``total_steps``, ``allocations``,
            ``ranks_moved``, ``seconds`` (in allocations), ``start``, ``final`` and ``widest`` (``step``, ``ranks``,
            ``parameters``), ``budget`` (per unit, the amount used and the limit), ``modules`` (per module, the rank as
            made, the present rank, and the numbers that were pruned and added) and ``projections`` (the same sums per
            projection).
    """

    rows: tuple[tuple[str, str], ...]
    data: Mapping[str, Any]

    def __str__(self) -> str:
        width = max(len(what) for what, _ in self.rows)
        return "\n".join(f"{what:<{width}}  {text}" for what, text in self.rows)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        cells = "".join(
            f'<tr><th style="text-align:left">{escape(what)}</th><td style="text-align:left">{escape(text)}</td></tr>'
            for what, text in self.rows
        )
        return f"<table>{cells}</table>"


def summarise(records: Sequence[Record], result: Record | None = None) -> Summary:
    """The summary of a run.

    Args:
        records: the history of the run so far, at least one record. A run that was resumed in another folder begins
            with the step from which it was resumed.
        result: the ranks of the result, if they are not those of the last record: of the best checkpoint, for example.

    Raises:
        HistoryError: there is no record.
    """
    if not records:
        raise HistoryError("the history has no record, so there is nothing to summarise: the run has not begun")
    first, last = records[0], records[-1] if result is None else result
    allocations = [record for record in records if not record.details.get("begins")]
    moves = [moved(record) for record in allocations]
    widest = max(records, key=lambda record: record.parameters)
    made = made_with(first)
    seconds = sum(record.seconds for record in allocations)
    modules = {
        name: {
            "made": made[name],
            "rank": rank,
            "pruned": sum(len(record.pruned.get(name, ())) for record in allocations),
            "added": sum(record.added.get(name, 0) for record in allocations),
        }
        for name, rank in last.ranks.items()
    }
    projections = by_projection(modules)
    data = {
        "method": last.method,
        "step": records[-1].step,
        "total_steps": first.details.get("total_steps"),
        "allocations": len(allocations),
        "ranks_moved": sum(moves),
        "seconds": seconds,
        "start": {"step": first.step, "ranks": first.total_rank, "parameters": first.parameters},
        "final": {"step": last.step, "ranks": last.total_rank, "parameters": last.parameters},
        "widest": {"step": widest.step, "ranks": widest.total_rank, "parameters": widest.parameters},
        "budget": {unit: dict(amount) for unit, amount in last.budget.items()},
        "modules": modules,
        "projections": projections,
    }
    ranks = [rank for rank in last.ranks.values() if rank]
    many = sum(1 for count in moves if count)
    total = first.details.get("total_steps")
    steps = "" if total is None else f", in a run of {total:,} steps"
    did = f"moved {count(sum(moves), 'rank')} in {count(many, 'allocation')}" if many else "moved no rank"
    earlier = "" if last.ranks == records[-1].ranks else "; the result is an earlier checkpoint"
    peak = f", at most {widest.parameters:,} (after step {widest.step})" if _peaks(widest, first, last) else ""
    each = f", {seconds / len(allocations):.2g} s each" if len(allocations) > 1 else ""
    rows = (
        (last.method, f"{did}{steps}{earlier}"),
        ("ranks", f"{change(first.total_rank, last.total_rank)} in {len(ranks)} of {len(last.ranks)} modules, "
                  f"the highest {max(ranks, default=0)}"),
        ("parameters", f"{change(first.parameters, last.parameters)}{peak}"),
        ("budget", budget_text(last.budget) or "none"),
        ("gained", _named(last.ranks, made, 1)),
        ("lost", _named(last.ranks, made, -1)),
        ("by projection", _projections(projections)),
        ("cost", f"{seconds:.1f} s for {count(len(allocations), 'allocation')}{each}, scoring included"),
    )  # fmt: skip
    return Summary(rows, data)


def moved(record: Record) -> int:
    """The number of ranks that an allocation pruned and added."""
    return sum(map(len, record.pruned.values())) + sum(record.added.values())


def made_with(first: Record) -> Mapping[str, int]:
    """Per module, the rank that the adapter was made with, before the method's wide or even beginning.

    Args:
        first: the first record of a run.
    """
    made = first.details.get("made")
    return made if isinstance(made, Mapping) and made.keys() == first.ranks.keys() else first.ranks


def by_projection(modules: Mapping[str, Mapping[str, int]]) -> dict[str, dict[str, int]]:
    """Numbers by module, summed over the modules of a projection (:func:`projections`), in the order of the model.

    Args:
        modules: per module, numbers by name.
    """
    sums: dict[str, dict[str, int]] = {}
    for name, projection in projections(list(modules)).items():
        own = sums.setdefault(projection, {})
        for key, value in modules[name].items():
            own[key] = own.get(key, 0) + value
    return sums


def projections(modules: Sequence[str]) -> dict[str, str]:
    """Per module, the name that it shares with the same module of other blocks: q_proj.

    It is the last part of the module's name; or all parts after the number of the block where the last part has
    several meanings, as ``dense`` in BERT (attention.output.dense, output.dense).
    """
    ends = {name: _after_block(name) for name in modules}
    meanings: dict[str, set[str]] = {}
    for end in ends.values():
        meanings.setdefault(end.rpartition(".")[2], set()).add(end)
    return {name: last if len(meanings[last := end.rpartition(".")[2]]) == 1 else end for name, end in ends.items()}


def _after_block(module: str) -> str:
    parts = module.split(".")
    block = max((index for index, part in enumerate(parts[:-1]) if part.isdecimal()), default=-1)
    return ".".join(parts[block + 1 :])


def short_names(modules: Sequence[str]) -> dict[str, str]:
    """Names of modules without the parts that all of them begin with, but for the last such part (layers.0.…)."""
    parts = [name.split(".") for name in modules]
    common = 0
    while len(modules) > 1 and all(len(p) > common + 1 and p[common] == parts[0][common] for p in parts):
        common += 1
    start = max(0, common - 1)
    return {name: ".".join(own[start:]) for name, own in zip(modules, parts, strict=True)}


def change(before: int, after: int) -> str:
    """Two numbers as text: 168 → 151; one number if they are equal."""
    return f"{before:,}" if before == after else f"{before:,} → {after:,}"


def budget_text(budget: Mapping[str, Mapping[str, float]]) -> str:
    """How much of a budget is used, as text: 82,784 of 82,944 parameters (99.8 % used). Empty without a budget.

    Args:
        budget: per unit, the amount used and the limit (:meth:`lorank.ResolvedBudget.used`).
    """
    return "; ".join(
        f"{_number(amount['used'])} of "
        + UNITS.get(unit, "{} " + unit.replace("_", " ")).format(_number(amount["limit"]))
        + f" ({100 * share(amount):.1f} % used)"
        for unit, amount in budget.items()
    )


def named_budget_text(named: Mapping[str, float]) -> str:
    """A budget as a user named it, as text: 50 % of adapter, 120 ranks.

    Args:
        named: the limits by name (:attr:`lorank.Budget.named`).
    """
    return " and ".join(UNITS.get(unit, "{} " + unit).format(_number(value)) for unit, value in named.items())


def share(amount: Mapping[str, float]) -> float:
    """The part of a limit that is used, from 0 to 1; more if it is exceeded."""
    return amount["used"] / amount["limit"] if amount["limit"] else 0.0


def _number(value: float) -> str:
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:,.4g}"


def count(number: int, what: str) -> str:
    """A number of things as text: 1 rank, 2 ranks."""
    return f"{number:,} {what}" if number == 1 else f"{number:,} {what}s"


def _peaks(widest: Record, first: Record, last: Record) -> bool:
    return widest.parameters > max(first.parameters, last.parameters)


def _named(ranks: Mapping[str, int], made: Mapping[str, int], sign: int) -> str:
    """The modules that gained (sign 1) or lost (−1) most against the adapter as it was made."""
    differences = {name: sign * (rank - made[name]) for name, rank in ranks.items()}
    found = sorted((name for name in ranks if differences[name] > 0), key=lambda name: -differences[name])
    if not found:
        return "no module"
    short, mark = short_names(list(ranks)), "+" if sign > 0 else "−"
    text = ", ".join(f"{short[name]} {mark}{differences[name]}" for name in found[:NAMED])
    more = f", {count(len(found) - NAMED, 'more module')}" if len(found) > NAMED else ""
    return f"{text}{more} (against {_made_text(made)})"


def _made_text(made: Mapping[str, int]) -> str:
    low, high = min(made.values()), max(made.values())
    return f"rank {low} as made" if low == high else "the ranks as made"


def _projections(sums: Mapping[str, Mapping[str, int]]) -> str:
    return ", ".join(f"{name} {change(own['made'], own['rank'])}" for name, own in sums.items())
