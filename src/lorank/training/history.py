"""The rank history: one immutable record per allocation, saved as one line of JSON. Reports read nothing else.

Each line is flushed to disk before training continues. A killed process can leave an incomplete last line. Readers
ignore it, and a resumed run removes it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lorank.allocators import Allocation, Allocator, ResolvedBudget
from lorank.errors import LorankError
from lorank.files import append_text, parse_json, write_text
from lorank.lora import AdapterLayers

MAX_LINE = 64_000_000
"""Maximum bytes in a line. The largest models with thousands of ranks need far less."""


MAX_RANK = 1 << 24
"""Larger than every rank and width of a layer. A larger number means that the file is damaged."""


class HistoryError(LorankError):
    """A history file cannot be read."""


@dataclass(frozen=True)
class Record:
    """One allocation, or the start of a run (step 0, without scores).

    Args:
        step: the number of optimiser steps before the allocation. ≥ 0.
        method: the allocator's class name.
        ranks: per module, its rank after the allocation.
        shapes: per module, (d_in, d_out).
        pruned: per module that lost ranks, the indices of these ranks.
        added: per module that received ranks, their number.
        scores: per module, one score per rank before the change; empty if nothing was scored.
        seconds: the duration of the allocation, including scoring.
        details: the method's own values (loss, evaluations, engine, …); empty if nothing was allocated.
        active: per module, the number of active ranks, for methods that switch ranks off before they remove them; empty
            if all ranks are active.
        budget: per unit of the budget, the amount ``used`` by ``ranks`` and the ``limit``; empty without a budget.
    """

    step: int
    method: str
    ranks: Mapping[str, int]
    shapes: Mapping[str, Sequence[int]] = field(default_factory=dict)
    pruned: Mapping[str, Sequence[int]] = field(default_factory=dict)
    added: Mapping[str, int] = field(default_factory=dict)
    scores: Mapping[str, Sequence[float]] = field(default_factory=dict)
    seconds: float = 0.0
    details: Mapping[str, Any] = field(default_factory=dict)
    active: Mapping[str, int] = field(default_factory=dict)
    budget: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    @property
    def total_rank(self) -> int:
        return sum(self.ranks.values())

    @property
    def parameters(self) -> int:
        """Number of elements of A and B over all modules: Σ r (d_in + d_out)."""
        return sum(rank * sum(self.shapes[name]) for name, rank in self.ranks.items())

    def to_json(self) -> str:
        return json.dumps({**asdict(self), "total_rank": self.total_rank, "parameters": self.parameters})

    @classmethod
    def from_json(cls, line: str) -> Record:
        """Parses a line. Raises HistoryError for a line that :meth:`to_json` cannot have written."""
        try:
            return cls(**_checked_fields(parse_json(line)))
        except (ValueError, OverflowError) as error:
            raise HistoryError(f"not a line of a rank history ({error}): {line[:80]!r}") from error


class RankHistory(Sequence[Record]):
    """The records of a run in memory, and in a JSONL file if a path is given.

    Args:
        path: the file. It is created, with its folder, at the first record. An existing file is renamed when a new run
            begins, and continued when a run is resumed.
    """

    def __init__(self, path: str | Path | None = None) -> None:
        self.path = Path(path) if path is not None else None
        self._records: list[Record] = []

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: Any) -> Any:
        return self._records[index]

    def __iter__(self) -> Iterator[Record]:
        return iter(self._records)

    @property
    def allocations(self) -> list[Record]:
        """The records of allocations only, without the records of starting and resuming a run."""
        return [record for record in self._records if not record.details.get("begins")]

    def begin(self, record: Record) -> None:
        """Starts a new run: renames an older file (``….1.jsonl``, ``….2.jsonl``, …) and writes the first record.

        Raises:
            WriteError: no space, no permission. The older file has its name and the records are as before.
        """
        old_path: Path | None = None
        if self.path is not None and self.path.exists():
            old_path = _free_name(self.path)
            self.path.rename(old_path)
        try:
            self._write(record)
        except BaseException:
            if self.path is not None:
                with suppress(OSError):
                    self.path.unlink()  # an empty file
                if old_path is not None:
                    old_path.rename(self.path)
            raise
        self._records = [record]

    def resume(self, step: int, fallback: Record) -> None:
        """Resumes a run after ``step``: keeps the records up to this step and drops later ones.

        Args:
            step: the number of optimiser steps done. ≥ 0.
            fallback: the first record if none is kept: without a file (a run that is resumed in another folder), or
                without a path, if the records in memory do not lead to the ranks of this record.

        Raises:
            HistoryError: the file cannot be read.
            WriteError: the file cannot be written.
        """
        if self.path is None:
            kept = [record for record in self._records if record.step <= step]
            self._records = kept if kept and kept[-1].ranks == fallback.ranks else [fallback]
            return
        if not self.path.exists():
            self._write(fallback)
            self._records = [fallback]
            return
        kept = [record for record in read_history(self.path) if record.step <= step]
        write_text(self.path, "".join(f"{record.to_json()}\n" for record in kept))
        self._records = kept

    def append(self, record: Record) -> None:
        self._write(record)
        self._records.append(record)

    def _write(self, record: Record) -> None:
        if self.path is not None:
            append_text(self.path, f"{record.to_json()}\n")


def _free_name(path: Path) -> Path:
    """The first of ``….1.jsonl``, ``….2.jsonl``, … that does not exist."""
    number = 1
    while (found := path.with_name(f"{path.stem}.{number}{path.suffix}")).exists():
        number += 1
    return found


def read_history(path: str | Path) -> list[Record]:
    """Reads all records of a history file. An incomplete last line (of a process killed while writing) is ignored.

    Raises:
        HistoryError: the file does not exist, or a line is not a record.
    """
    path = Path(path)
    if not path.is_file():
        raise HistoryError(f"there is no rank history at {path}: give the rank_history.jsonl of a run")
    records: list[Record] = []
    try:
        with path.open("rb") as file:
            while line := file.readline(MAX_LINE + 1):
                if len(line) > MAX_LINE:
                    raise HistoryError(f"{path}: line {len(records) + 1} has more than {MAX_LINE:,} bytes")
                if line.endswith(b"\n"):
                    records.append(Record.from_json(line.decode("utf-8")))
    except (OSError, UnicodeDecodeError) as error:
        raise HistoryError(f"{path} cannot be read, line {len(records) + 1}: {error}") from error
    except HistoryError as error:
        raise HistoryError(f"{path}, line {len(records) + 1}: {error}") from error
    return records


def record_of(
    step: int,
    allocator: Allocator,
    layers: AdapterLayers,
    allocation: Allocation,
    before: Mapping[str, int],
    seconds: float,
    budget: ResolvedBudget | None = None,
) -> Record:
    """Makes the record of an allocation that has been carried out.

    Args:
        step: the number of optimiser steps done.
        allocator: the method.
        layers: the LoRA layers, after the allocation.
        allocation: the allocation.
        before: the rank of each module before the allocation.
        seconds: its duration.
        budget: the budget of the run, or None.
    """
    plan = allocation.plan
    pruned = {name: sorted(set(range(before[name])) - set(change.keep)) for name, change in plan.items()}
    active = dict(allocation.active)
    if not active and layers.gates is not None:
        active = {name: int(leaf.count_nonzero()) for name, leaf in layers.gates.leaves.items()}
    return Record(
        step=step,
        method=type(allocator).__name__,
        ranks=layers.ranks,
        shapes={name: (layer.d_in, layer.d_out) for name, layer in layers.items()},
        pruned={name: gone for name, gone in pruned.items() if gone},
        added={name: change.add for name, change in plan.items() if change.add},
        scores={name: values.tolist() for name, values in allocation.scores.items()},
        seconds=seconds,
        details=dict(allocation.details),
        active=active,
        budget={} if budget is None else budget.used(layers.ranks),
    )


def _checked_fields(values: Any) -> dict[str, Any]:
    """The fields of a :class:`~lorank.training.history.Record`, checked. Unknown fields are left out.

    Raises:
        ValueError: a field is missing or has the wrong type or range. The message names the field.
    """
    _require(isinstance(values, Mapping), "a mapping", values)
    for name in ("step", "method", "ranks"):
        if name not in values:
            raise ValueError(f"{name} is missing")
    found = {name: values[name] for name in _CHECKS if name in values}
    for name, value in found.items():
        try:
            _CHECKS[name](value)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    differing = set(found["ranks"]) ^ set(found.get("shapes", {}))
    if differing:
        raise ValueError(f"ranks and shapes name different modules: {min(differing)[:80]!r} is only in one of them")
    return found


def _check_count(value: Any) -> None:
    _require(isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_RANK, "a whole number", value)


def _check_step(value: Any) -> None:
    _require(isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63, "a whole number", value)


def _check_number(value: Any) -> None:
    _require(isinstance(value, int | float) and not isinstance(value, bool), "a number", value)


def _check_text(value: Any) -> None:
    _require(isinstance(value, str), "text", value)


def _check_shape(value: Any) -> None:
    _require(isinstance(value, list | tuple) and len(value) == 2, "(d_in, d_out)", value)
    for length in value:
        _check_count(length)


def _list_of(check: Callable[[Any], None]) -> Callable[[Any], None]:
    def each(value: Any) -> None:
        _require(isinstance(value, list | tuple), "a list", value)
        for part in value:
            check(part)

    return each


def _by_module(check: Callable[[Any], None]) -> Callable[[Any], None]:
    def each(value: Any) -> None:
        _require(isinstance(value, Mapping), "a mapping from modules", value)
        for name, part in value.items():
            try:
                check(part)
            except ValueError as error:
                raise ValueError(f"{name[:80]}: {error}") from None

    return each


def _check_amount(value: Any) -> None:
    _require(isinstance(value, Mapping) and value.keys() == {"used", "limit"}, "the amount used and the limit", value)
    for number in value.values():
        _check_number(number)


def _check_mapping(value: Any) -> None:
    _require(isinstance(value, Mapping), "a mapping", value)


def _require(condition: bool, expected: str, value: Any) -> None:
    if not condition:
        shown = repr(value) if isinstance(value, str | int | float | None) else type(value).__name__
        raise ValueError(f"expected {expected}, got {shown[:80]}")


_CHECKS: Mapping[str, Callable[[Any], None]] = {
    "step": _check_step,
    "method": _check_text,
    "ranks": _by_module(_check_count),
    "shapes": _by_module(_check_shape),
    "pruned": _by_module(_list_of(_check_count)),
    "added": _by_module(_check_count),
    "scores": _by_module(_list_of(_check_number)),
    "seconds": _check_number,
    "details": _check_mapping,
    "active": _by_module(_check_count),
    "budget": _by_module(_check_amount),
}
