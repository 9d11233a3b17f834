"""Choosing each contender's settings on tuning seeds, and then its test runs on other seeds.

The grid of learning rates grows by a factor, such as two, until the best rate has a worse neighbour on both sides. The
choice sees the selection loss alone, which comes from validation data.

A contender may come *after* another one: each of its trials needs the result of the other's with the same seed, at the
other's best setting. So a control can begin with the ranks that a method ended with.
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
        trial: makes the trial of a setting, a seed and a stage; for a contender that comes after another one, also of
            the other's line.
        selection: the selection loss in a line, lower is better; infinite for a run that failed.
        growth: the largest number of learning rates by which the grid grows. ≥ 0.
        factor: the ratio of neighbouring rates by which it grows. > 1. New rates are rounded to three digits.
        after: the contender whose results the trials need; or None.
    """

    kind: str
    grid: Sequence[Setting]
    trial: Callable[..., Trial]
    selection: Callable[[Line], float]
    growth: int = 0
    factor: float = 2.0
    after: Contender | None = None


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


def trial_of(
    contender: Contender,
    setting: Setting,
    seed: int,
    stage: Stage,
    *,
    tuning_seeds: Sequence[int],
    known: Mapping[str, Line],
) -> Trial | None:
    """A trial of a contender. None: it needs a result of another contender that is not there yet."""
    other = contender.after
    if other is None:
        return contender.trial(setting, seed, stage)
    best = tune(other, tuning_seeds, known).best
    if best is None:
        return None
    before = trial_of(other, best, seed, stage, tuning_seeds=tuning_seeds, known=known)
    line = None if before is None else known.get(before.fingerprint)
    return None if line is None else contender.trial(setting, seed, stage, line)


def tune(contender: Contender, seeds: Sequence[int], known: Mapping[str, Line]) -> Tuning:
    """The state of a contender's tuning, from the lines that are known."""
    asked, losses = list(contender.grid), {}
    for step in itertools.count():
        for setting in asked[-1:] if step else asked:
            trials = [trial_of(contender, setting, s, "tuning", tuning_seeds=seeds, known=known) for s in seeds]
            found = [None if trial is None else known.get(trial.fingerprint) for trial in trials]
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
        upwards = best[0] == rates[-1] and len(rates) > 1
        further = best[0] * contender.factor if upwards else best[0] / contender.factor
        asked.append((float(f"{further:.3g}"), best[1]))
    raise AssertionError("unreachable")


def study_plan(contenders: Sequence[Contender], *, tuning_seeds: Sequence[int], seeds: Sequence[int]) -> Plan:
    """The plan of a study: the tuning runs of all contenders, and the test runs of those whose setting is chosen."""

    def plan(known: Mapping[str, Line]) -> Wanted:
        tuned = [(contender, tune(contender, tuning_seeds, known)) for contender in contenders]
        # runs of one seed follow each other, since they may share their data
        asked: list[tuple[Contender, Setting, int, Stage]] = [
            (contender, setting, seed, "tuning")
            for seed in tuning_seeds
            for contender, state in tuned
            for setting in state.asked
        ]
        asked += [
            (contender, state.best, seed, "test")
            for seed in seeds
            for contender, state in tuned
            if state.best is not None
        ]
        trials = [trial_of(*one, tuning_seeds=tuning_seeds, known=known) for one in asked]
        later = [one[0].kind for one, trial in zip(asked, trials, strict=True) if trial is None]
        later += [contender.kind for contender, state in tuned if state.best is None for _ in seeds]
        return Wanted([trial for trial in trials if trial is not None], len(later), later)

    return plan


def _mean(losses: Sequence[float]) -> float:
    return sum(losses) / len(losses) if all(map(math.isfinite, losses)) else math.inf
