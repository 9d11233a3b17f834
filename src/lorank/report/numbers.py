"""The plain numbers that pictures and reports are made of: no model, no tensor, no file."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

Table = tuple[tuple[str, ...], Sequence[Sequence[str]]]
"""The head and the rows of a table, as text."""


@dataclass(frozen=True)
class Frame:
    """The ranks after the start of a run (the first frame), or after one of its allocations.

    Args:
        step: the number of optimiser steps before it. ≥ 0.
        ranks: per module, the ranks in use. ≥ 0.
        parameters: LoRA parameters that are stored and trained.
        pruned: ranks that the allocation removed.
        added: ranks that it added.
        limit: LoRA parameters that the budget allowed at this step; None: no such budget.
        heads: per module with a LoRA per attention head, the rank of each head; empty for other methods.
    """

    step: int
    ranks: Mapping[str, int]
    parameters: int
    pruned: int = 0
    added: int = 0
    limit: float | None = None
    heads: Mapping[str, Sequence[int]] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """The ranks in use, in all modules."""
        return sum(self.ranks.values())


@dataclass(frozen=True)
class Worth:
    """What the ranks were worth when they were last scored.

    Args:
        step: the optimiser steps done then.
        scores: per module, one score per rank; higher = keep. May be NaN or infinite.
        pruned: per module, the indices of the ranks that were removed.
    """

    step: int
    scores: Mapping[str, Sequence[float]]
    pruned: Mapping[str, Sequence[int]] = field(default_factory=dict)


@dataclass(frozen=True)
class CurveNumbers:
    """A rank curve.

    Args:
        points: (parameters, predicted loss).
        knee: the point beyond which parameters pay less than on the average of the curve; or None.
        title: what it was measured on.
    """

    points: Sequence[tuple[int, float]]
    knee: tuple[int, float] | None = None
    title: str = ""


@dataclass(frozen=True)
class Quality:
    """How good one run came out.

    Args:
        metric: what was measured, e.g. "validation loss".
        value: the measured value.
        task: runs are compared if their tasks are the same.
        setting: runs with the same setting differ in their seed only.
        seed: the seed; None: unknown.
        higher_is_better: whether a higher value is better.
    """

    metric: str
    value: float
    task: str = ""
    setting: str = ""
    seed: int | None = None
    higher_is_better: bool = False


@dataclass(frozen=True)
class RunNumbers:
    """Everything about one run that pictures and reports show.

    Args:
        name: the run's name in them, unique among the runs of a report.
        method: the method's name.
        frames: at least one, by step.
        reference: per module, the rank that changes are counted from.
        reference_name: where those are from, e.g. "the adapter as it was made".
        worth: the scores of the last allocation with scores; or None.
        losses: (step, training loss).
        validation: (step, validation loss).
        steps: optimiser steps in all; None: unknown.
        asked: what was asked, (name, value) as text.
        came_out: what came out, (name, value) as text.
        cost: what it cost, (name, value) as text.
        notes: what a reader must know before believing the numbers.
        curve: the rank curve beside the run; or None.
        quality: how good it came out; or None.
    """

    name: str
    method: str
    frames: Sequence[Frame]
    reference: Mapping[str, int]
    reference_name: str = "the start of the run"
    worth: Worth | None = None
    losses: Sequence[tuple[int, float]] = ()
    validation: Sequence[tuple[int, float]] = ()
    steps: int | None = None
    asked: Sequence[tuple[str, str]] = ()
    came_out: Sequence[tuple[str, str]] = ()
    cost: Sequence[tuple[str, str]] = ()
    notes: Sequence[str] = ()
    curve: CurveNumbers | None = None
    quality: Quality | None = None

    @property
    def last(self) -> Frame:
        return self.frames[-1]

    @property
    def changes(self) -> dict[str, int]:
        """Per module, its rank at the end minus its rank in the reference."""
        return {name: rank - self.reference.get(name, 0) for name, rank in self.last.ranks.items()}

    @property
    def moved(self) -> int:
        """Ranks pruned and added in all allocations."""
        return sum(frame.pruned + frame.added for frame in self.frames)


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds with its uncertainty.

    Args:
        label: the method or setting.
        mean: the mean.
        low: the lower end of its 95 % interval; NaN: unknown (one seed).
        high: the upper end.
        values: the value of every seed.
        parameters: trainable parameters at the end; None: unknown.
        note: a sentence about it, or "".
        more: further columns of the table, as text.
    """

    label: str
    mean: float
    low: float = math.nan
    high: float = math.nan
    values: Sequence[float] = ()
    parameters: float | None = None
    note: str = ""
    more: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Comparison:
    """Methods or settings, side by side.

    Args:
        title: what is compared, e.g. the task.
        metric: what was measured.
        groups: per group (a budget; "" if there is one group), its estimates.
        higher_is_better: the direction of the metric.
        sentence: what came out.
        warning: why the numbers show less than they seem to; "".
    """

    title: str
    metric: str
    groups: Mapping[str, Sequence[Estimate]]
    higher_is_better: bool = False
    sentence: str = ""
    warning: str = ""

    @property
    def notes(self) -> list[str]:
        """The sentences about single estimates; of several groups, with the group's name."""
        notes = [(group, one.note) for group, some in self.groups.items() for one in some if one.note]
        return [f"{group}. {note}" if len(self.groups) > 1 else note for group, note in notes]


_T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""Student's t, two-sided 95 %, by degrees of freedom from 1."""


def estimate(label: str, values: Sequence[float], *, parameters: float | None = None) -> Estimate:
    """The mean of independent values with its 95 % interval by Student's t; of one value, without an interval."""
    count = len(values)
    mean = sum(values) / count
    if count < 2 or not all(map(math.isfinite, values)):
        return Estimate(label, mean, values=tuple(values), parameters=parameters)
    error = math.sqrt(sum((value - mean) ** 2 for value in values) / (count - 1) / count)
    # above ten values, 1.96 + 2.4 / df is within 0.02 of Student's t
    factor = _T_95[count - 2] if count - 2 < len(_T_95) else 1.96 + 2.4 / (count - 1)
    return Estimate(label, mean, mean - factor * error, mean + factor * error, tuple(values), parameters)
