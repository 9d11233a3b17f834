from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import pytest

from lorank.experiments.study.trials import Line
from lorank.experiments.study.tuning import Contender, Setting, Stage, study_plan, tune


@dataclass(frozen=True)
class Asked:
    setting: Setting
    seed: int
    stage: Stage

    @property
    def fingerprint(self) -> str:
        return f"{self.setting} {self.seed} {self.stage}"

    @property
    def label(self) -> str:
        return self.fingerprint

    @property
    def kind(self) -> str:
        return ""


def contender(lrs: list[float], growth: int = 4, knobs: tuple[Any, ...] = (None,)) -> Contender:
    return Contender("it", [(lr, knob) for lr in lrs for knob in knobs], Asked, lambda line: line["loss"], growth)


def solve(one: Contender, loss: Any, seeds: list[int] | None = None) -> tuple[Any, dict[str, Line], list[Asked]]:
    """Answers every trial of a plan by ``loss``, until the plan wants no more."""
    plan = study_plan([one], tuning_seeds=[7, 8], seeds=seeds or [0, 1])
    known: dict[str, Line] = {}
    asked: list[Any] = []
    while True:
        missing = [trial for trial in plan(known).trials if trial.fingerprint not in known]
        if not missing:
            return tune(one, [7, 8], known), known, asked
        asked.append(missing[0])
        known[missing[0].fingerprint] = {"loss": loss(missing[0])}


@pytest.mark.parametrize(
    ("best", "expected"),
    [
        (2.0, [1.0, 2.0, 4.0]),
        (1.0, [0.5, 1.0, 2.0, 4.0]),
        (0.25, [0.125, 0.25, 0.5, 1.0, 2.0, 4.0]),
        (8.0, [1.0, 2.0, 4.0, 8.0, 16.0]),
    ],
)
def test_the_grid_grows_until_both_neighbours_of_the_best_are_worse(best: float, expected: list[float]) -> None:
    tuned, _, _ = solve(contender([1.0, 2.0, 4.0]), lambda trial: abs(math.log2(trial.setting[0] / best)))
    assert tuned.best == (best, None)
    assert sorted(lr for lr, _ in tuned.losses) == expected
    assert not tuned.capped


def test_growth_has_an_end_which_is_told() -> None:
    tuned, _, _ = solve(contender([1.0, 2.0], growth=3), lambda trial: -trial.setting[0])
    assert (tuned.best, tuned.capped) == ((16.0, None), True)
    fixed, _, _ = solve(contender([1.0, 2.0], growth=0), lambda trial: -trial.setting[0])
    assert (fixed.best, fixed.capped) == ((2.0, None), False)
    # one rate has no neighbour at all
    single, _, _ = solve(contender([1.0]), lambda trial: abs(math.log2(trial.setting[0])))
    assert sorted(lr for lr, _ in single.losses) == [0.5, 1.0, 2.0]


def test_rates_that_diverge_count_as_infinite() -> None:
    tuned, _, _ = solve(
        contender([1.0, 2.0, 4.0]), lambda trial: trial.setting[0] if trial.setting[0] < 2 else math.inf
    )
    assert tuned.best[0] < 1
    hopeless, _, _ = solve(contender([1.0, 2.0], growth=2), lambda trial: math.inf)
    assert (hopeless.best[0], hopeless.capped) == (0.25, True)


def test_the_choice_sees_tuning_runs_alone() -> None:
    """Test runs would say the opposite; they are asked only at the chosen rate, and never decide."""

    def loss(trial: Asked) -> float:
        near = abs(math.log2(trial.setting[0] / 2))
        return -near if trial.stage == "test" else near + trial.seed

    tuned, _, asked = solve(contender([1.0, 2.0, 4.0]), loss)
    assert tuned.best == (2.0, None)
    assert tuned.losses[2.0, None] == 7.5  # the mean over the tuning seeds
    assert {(trial.setting[0], trial.seed) for trial in asked if trial.stage == "test"} == {(2.0, 0), (2.0, 1)}
    assert {trial.seed for trial in asked if trial.stage == "tuning"} == {7, 8}
    first_test = next(place for place, trial in enumerate(asked) if trial.stage == "test")
    assert all(trial.stage == "test" for trial in asked[first_test:])


def test_a_grid_grows_by_its_own_factor() -> None:
    one = dataclasses.replace(contender([0.01, 0.0178]), factor=10**0.25)
    tuned, _, _ = solve(one, lambda trial: -trial.setting[0] if trial.setting[0] < 0.05 else 1.0)
    assert sorted(lr for lr, _ in tuned.losses) == [0.01, 0.0178, 0.0317, 0.0564]
    assert tuned.best == (0.0317, None)


def test_a_contender_that_comes_after_another_one() -> None:
    """Its trials have the other's results of the same seed and stage, at the other's best setting."""

    def trial(setting: Setting, seed: int, stage: Stage, line: Line) -> Asked:
        return Asked((setting[0], line["loss"]), seed, stage)

    first = contender([1.0, 2.0, 4.0])
    second = Contender("second", [(8.0, None), (16.0, None)], trial, lambda line: line["loss"], after=first)
    plan = study_plan([second, first], tuning_seeds=[7, 8], seeds=[0, 1])
    known: dict[str, Line] = {}
    assert (len(plan(known).trials), plan(known).later) == (6, 4 + 4)
    while missing := [one for one in plan(known).trials if one.fingerprint not in known]:
        for one in missing:
            lr, before = one.setting  # type: ignore[attr-defined]  # a field of this kind of trial
            known[one.fingerprint] = {"loss": abs(lr - 2) + one.seed / 100 if before is None else lr - before}  # type: ignore[attr-defined]  # a field of this kind of trial
    assert plan(known).later == 0
    after = [one for one in plan(known).trials if one.setting[1] is not None]  # type: ignore[attr-defined]  # a field of this kind of trial
    assert {(one.seed, one.stage, one.setting[1]) for one in after} == {  # type: ignore[attr-defined]  # a field of this kind of trial
        (7, "tuning", 0.07),
        (8, "tuning", 0.08),
        (0, "test", 0.0),
        (1, "test", 0.01),
    }
    assert tune(second, [7, 8], known).best == (8.0, None)


def test_a_knob_is_chosen_with_the_rate() -> None:
    tuned, _, _ = solve(contender([1.0, 2.0], 0, (3, 4)), lambda trial: trial.setting[0] + trial.setting[1])
    assert tuned.best == (1.0, 3)


def test_runs_that_depend_on_a_choice_are_counted() -> None:
    wanted = study_plan([contender([1.0]), contender([2.0])], tuning_seeds=[7], seeds=[0, 1, 2])({})
    assert (len(wanted.trials), wanted.later, wanted.kinds) == (2, 6, ["it"] * 6)
