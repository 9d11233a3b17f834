"""How long a training run will still take: steps, allocations and evaluations have times of their own."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Sequence

RECENT = 50
"""The number of steps, allocations or evaluations whose mean time counts: lengths of batches and ranks change."""


class TimeLeft:
    """The time that a run still takes, from the mean times of what it has done so far.

    Args:
        total_steps: the number of optimiser steps of the whole run.
        allocations: the steps after which ranks are scored or moved.
        eval_steps: the number of steps between evaluations; None: there are none.
    """

    def __init__(self, total_steps: int, allocations: Iterable[int] = (), eval_steps: int | None = None) -> None:
        self._total_steps, self._eval_steps = total_steps, eval_steps
        self._allocations = sorted(allocations)
        self._steps, self._moves, self._evaluations = (deque[float](maxlen=RECENT) for _ in range(3))

    def add_step(self, seconds: float) -> None:
        """Notes the duration of a step, without allocation and evaluation."""
        self._steps.append(seconds)

    def add_allocation(self, seconds: float) -> None:
        """Notes the duration of an allocation."""
        self._moves.append(seconds)

    def add_evaluation(self, seconds: float) -> None:
        """Notes the duration of an evaluation."""
        self._evaluations.append(seconds)

    def seconds(self, step: int) -> float | None:
        """The seconds left after ``step``, without allocations and evaluations of unknown duration; None: unknown."""
        if not self._steps:
            return None
        evaluations = (
            0 if self._eval_steps is None else self._total_steps // self._eval_steps - step // self._eval_steps
        )
        return (
            (self._total_steps - step) * _mean(self._steps)
            + self.allocations(step) * _mean(self._moves)
            + evaluations * _mean(self._evaluations)
        )

    def allocations(self, step: int) -> int:
        """The number of allocations after ``step``."""
        return sum(1 for due in self._allocations if due > step)

    @property
    def knows_allocations(self) -> bool:
        """Whether an allocation's duration is known."""
        return bool(self._moves)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def duration(seconds: float) -> str:
    """A time, short: 0.3 s, 42 s, 6 min 3 s, 2 h 5 min."""
    if not math.isfinite(seconds):
        return "unknown"
    if seconds < 10:
        return f"{seconds:.2g} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
