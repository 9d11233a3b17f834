"""Choosing each contender's settings on tuning seeds, and then its test runs on other seeds.

The grid of learning rates grows by factors of two until the best rate has a worse neighbour on both sides. The choice
sees the selection loss alone, which comes from validation data.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lorank.experiments.study.trials import Line, Plan, Trial, Wanted

Stage = Literal["tuning", "test"]
Setting = tuple[float, Any]
"""(learning rate, value of another setting, or None)."""


@dataclass(frozen=True)
class Contender:
    """What is tuned and then tested: a method, at one budget.

    Args:
        kind: its name for estimates of time.
        grid: the first settings to try.
        trial: makes the trial of a setting, a seed and a stage.
        selection: the selection loss in a line, lower is better; infinite for a run that failed.
        growth: the largest number of learning rates by which the grid grows. ≥ 0.
    """

    kind: str
    grid: Sequence[Setting]
    trial: Callable[[Setting, int, Stage], Trial]
    selection: Callable[[Line], float]
    growth: int = 0


@dataclass(frozen=True)
class Tuning:
    """How far the tuning of a contender is.

    Args:
        losses: the selection loss of every setting that all tuning seeds have tried, mean over these seeds.
        asked: all settings that are wanted, as far as known.
        best: the chosen setting; None while runs are missing.
        capped: whether the best rate is at an end of the grid, and the grid may not grow any more.
    """

    losses: Mapping[Setting, float]
    asked: Sequence[Setting]
    best: Setting | None
    capped: bool


def tune(contender: Contender, seeds: Sequence[int], known: Mapping[str, Line]) -> Tuning:
    """The state of a contender's tuning, from the lines that are known."""
    asked, losses = list(contender.grid), {}
    for step in itertools.count():
        for setting in asked[-1:] if step else asked:
            found = [known.get(contender.trial(setting, seed, "tuning").fingerprint) for seed in seeds]
            lines = [line for line in found if line is not None]
            if len(lines) == len(seeds):
                losses[setting] = _mean([contender.selection(line) for line in lines])
        if len(losses) < len(asked):
            return Tuning(losses, asked, None, False)
        best = min(losses, key=lambda setting: (losses[setting], setting[0]))  # of equal losses, the lower rate
        rates = sorted(lr for lr, other in losses if other == best[1])
        at_end = best[0] in (rates[0], rates[-1])
        if not at_end or contender.growth in (0, step):
            return Tuning(losses, asked, best, at_end and contender.growth > 0)
        asked.append((best[0] * 2 if best[0] == rates[-1] and len(rates) > 1 else best[0] / 2, best[1]))
    raise AssertionError("unreachable")


def study_plan(contenders: Sequence[Contender], *, tuning_seeds: Sequence[int], seeds: Sequence[int]) -> Plan:
    """The plan of a study: the tuning runs of all contenders, and the test runs of those whose setting is chosen."""

    def plan(known: Mapping[str, Line]) -> Wanted:
        tuned = [(contender, tune(contender, tuning_seeds, known)) for contender in contenders]
        # runs of one seed follow each other, since they may share their data
        tuning = [
            contender.trial(setting, seed, "tuning")
            for seed in tuning_seeds
            for contender, state in tuned
            for setting in state.asked
        ]
        test = [
            contender.trial(state.best, seed, "test")
            for seed in seeds
            for contender, state in tuned
            if state.best is not None
        ]
        later = [contender.kind for contender, state in tuned if state.best is None for _ in seeds]
        return Wanted([*tuning, *test], len(later), later)

    return plan


def _mean(losses: Sequence[float]) -> float:
    return sum(losses) / len(losses) if all(map(math.isfinite, losses)) else math.inf
