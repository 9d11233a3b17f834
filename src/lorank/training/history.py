"""What happened to the ranks, one immutable record per allocation, one line of JSON each: the reports' only input."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from lorank.errors import LorankError


class HistoryError(LorankError):
    """A history file that cannot be read."""


@dataclass(frozen=True)
class Record:
    """One allocation, or the beginning of a run (step 0, without scores).

    Args:
        step: optimiser steps done when it happened.
        method: the allocator's class name.
        ranks: per module, its rank afterwards.
        shapes: per module, (d_in, d_out).
        pruned: per module that lost any, the indices of the ranks that went.
        added: per module that received any, how many.
        scores: per module, one score per rank before the change; empty where nothing was scored.
        seconds: what the allocation took, scoring included.
        details: the method's own numbers (loss, evaluations, engine, …); empty where nothing was allocated.
        active: per module, how many of its ranks count, where a method switches ranks off before it removes them; empty
            where all do.
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

    @property
    def total_rank(self) -> int:
        return sum(self.ranks.values())

    @property
    def parameters(self) -> int:
        """Numbers in all A and B: Σ r (d_in + d_out)."""
        return sum(rank * sum(self.shapes[name]) for name, rank in self.ranks.items())

    def to_json(self) -> str:
        return json.dumps({**asdict(self), "total_rank": self.total_rank, "parameters": self.parameters})

    @classmethod
    def from_json(cls, line: str) -> Record:
        """Raises HistoryError for anything that :meth:`to_json` did not write."""
        try:
            values = json.loads(line)
            record = cls(**{f.name: values[f.name] for f in fields(cls) if f.name in values})
            if not (isinstance(record.step, int) and all(isinstance(rank, int) for rank in record.ranks.values())):
                raise TypeError("step and ranks must be whole numbers")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise HistoryError(f"not a line of a rank history ({error}): {line[:80]!r}") from error
        return record


class RankHistory(Sequence[Record]):
    """Records in memory, and in a JSONL file if a path is given; each line is on disk before training goes on.

    Args:
        path: the file; made with its folder at the first record. One that is there already is moved aside when a new
            run begins, and continued when a run is resumed.
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
        """The records of allocations alone, without a run's beginning or going on."""
        return [record for record in self._records if not record.details.get("begins")]

    def begin(self, record: Record) -> None:
        """A new run: moves an older file aside (``….1.jsonl``, ``….2.jsonl``, …) and writes the first record."""
        self._records.clear()
        if self.path is not None and self.path.exists():
            number = 1
            while (aside := self.path.with_name(f"{self.path.stem}.{number}{self.path.suffix}")).exists():
                number += 1
            self.path.rename(aside)
        self.append(record)

    def resume(self, step: int, fallback: Record) -> None:
        """A run that goes on after ``step``: keeps the file's records up to it, and drops what came later.

        Args:
            fallback: what to write where there is no file (a run resumed in another folder).
        """
        if self.path is None or not self.path.exists():
            self._records.clear()
            self.append(fallback)
            return
        self._records = [record for record in read_history(self.path) if record.step <= step]
        scratch = self.path.with_name(f".{self.path.name}.part")
        _write(scratch, "".join(f"{record.to_json()}\n" for record in self._records), "w")
        os.replace(scratch, self.path)

    def append(self, record: Record) -> None:
        self._records.append(record)
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            _write(self.path, f"{record.to_json()}\n", "a")


def read_history(path: str | Path) -> list[Record]:
    """All records of a history file. A last line without its end (a process was killed while writing) is left out.

    Raises:
        HistoryError: no such file, or a line that is not a record.
    """
    path = Path(path)
    if not path.is_file():
        raise HistoryError(f"there is no rank history at {path}: name a run's rank_history.jsonl")
    *lines, _unfinished = path.read_text(encoding="utf-8").split("\n")
    return [Record.from_json(line) for line in lines]


def _write(path: Path, text: str, mode: str) -> None:
    with path.open(mode, encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
