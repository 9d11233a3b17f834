"""The planted study: every method is tuned on tuning seeds, then run on the reported seeds. It can be resumed.

Each finished run is one line of runs.jsonl (`study/trials.py`). A line is valid while the scenario and the method's
settings are unchanged; its fingerprint identifies them.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from lorank.errors import LorankError
from lorank.experiments.planted.methods import METHODS, method_of
from lorank.experiments.planted.problem import Scenario, make_problem
from lorank.experiments.planted.student import Outcome, train_student
from lorank.experiments.study.trials import Progress, Results, run_trials
from lorank.experiments.study.tuning import Contender, Setting, Stage, study_plan, tune

RUNS = "runs.jsonl"
SEEDS = (0, 1, 2, 3, 4)
TUNING_SEEDS = (100, 101)


@dataclass(frozen=True)
class Trial:
    """One student to train."""

    scenario: Scenario
    method: str
    lr: float
    knob: Any
    seed: int

    @property
    def fingerprint(self) -> str:
        """A hash of everything that decides the result, except the code."""
        return _fingerprint(self)

    @property
    def label(self) -> str:
        """The run in a few words."""
        return f"{self.method}, lr {self.lr:g}, seed {self.seed}"

    @property
    def kind(self) -> str:
        """The method: its runs take about the same time."""
        return self.method


@cache  # a plan asks for it again after every run, and a problem takes seconds to make
def _fingerprint(trial: Trial) -> str:
    problem, method = make_problem(trial.scenario, trial.seed), method_of(trial.method)
    described = [asdict(trial), method.allocator(problem, trial.knob).describe(), dict(method.ranks(problem))]
    return hashlib.sha256(json.dumps(described, sort_keys=True, default=str).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Row:
    """The results of one method on the reported seeds.

    Attributes:
        method: its key in ``METHODS``.
        lr: the chosen learning rate.
        knob: the chosen value of the method's knob; None: it has no knob.
        tuning: selection loss of every setting tried, mean over the tuning seeds.
        runs: per seed, the line of runs.jsonl.
    """

    method: str
    lr: float
    knob: Any
    tuning: Mapping[Setting, float]
    runs: Mapping[int, Mapping[str, Any]]


def run_trial(trial: Trial, device: str = "cpu") -> dict[str, Any]:
    """Trains one student and returns its line for runs.jsonl, without fingerprint. A NaN or infinite loss is None."""
    torch.set_num_threads(1)
    logging.getLogger("lorank").setLevel(logging.ERROR)
    problem = make_problem(trial.scenario, trial.seed)
    method = method_of(trial.method)
    try:
        outcome: Outcome | None = train_student(
            problem, method.ranks(problem), method.allocator(problem, trial.knob), lr=trial.lr, device=device
        )
        failure = None
    except LorankError as error:  # the method diverged or pruned every rank: a result, so the study goes on
        outcome, failure = None, f"{type(error).__name__}: {error}"
    record = {
        "scenario": trial.scenario.where,
        "method": trial.method,
        "lr": trial.lr,
        "knob": trial.knob,
        "seed": trial.seed,
        "device": device,
        "budget": problem.budget,
        "true": dict(problem.true),
        "failure": failure,
        **({} if outcome is None else asdict(outcome)),
    }
    for part in ("test", "selection"):
        loss = record.get(part)
        record[part] = loss if loss is not None and math.isfinite(loss) else None
    return record


def contender(scenario: Scenario, method: str) -> Contender:
    """A method and its settings to try."""

    def trial(setting: Setting, seed: int, stage: Stage) -> Trial:
        return Trial(scenario, method, *setting, seed)

    return Contender(
        kind=method,
        grid=method_of(method).grid,
        trial=trial,
        selection=selection_loss,
    )


def run_study(
    scenario: Scenario,
    methods: Sequence[str],
    out: Path,
    *,
    seeds: Sequence[int] = SEEDS,
    tuning_seeds: Sequence[int] = TUNING_SEEDS,
    jobs: int = 1,
    device: str = "cpu",
    report: Callable[[Progress], None] | None = None,
) -> list[Row]:
    """Tunes the methods and runs all runs that are not finished.

    Args:
        scenario: the planted updates and the training of students.
        methods: keys of ``METHODS``.
        out: the folder of runs.jsonl.
        seeds: the reported seeds; each seed draws another teacher, text, order of samples and initial A.
        tuning_seeds: seeds for choosing each method's settings; they are not reported.
        jobs: number of processes.
        device: the device for training. It is not part of the fingerprint: devices differ by rounding only.
        report: see :func:`lorank.experiments.study.trials.run_trials`.

    Returns:
        One row per method, in the given order.

    Raises:
        PlantedError: a seed is in both lists, a list is empty, a method is unknown or not for this scenario, or PyTorch
            cannot use the device.
        StudyError: the folder's file cannot be used.
    """
    _check(scenario, methods, seeds, tuning_seeds)
    check_device(device)
    contenders = {method: contender(scenario, method) for method in methods}
    known = run_trials(
        study_plan(list(contenders.values()), tuning_seeds=tuning_seeds, seeds=seeds),
        partial(run_trial, device=device),
        Results(out / RUNS),
        jobs=jobs,
        report=report,
    )
    rows = []
    for method, one in contenders.items():
        tuned = tune(one, tuning_seeds, known)
        assert tuned.best is not None  # the study has ended
        runs = {seed: known[one.trial(tuned.best, seed, "test").fingerprint] for seed in seeds}
        rows.append(Row(method, *tuned.best, tuned.losses, runs))
    return rows


class PlantedError(LorankError):
    """The study cannot be run with these arguments."""


def selection_loss(record: Mapping[str, Any]) -> float:
    """The selection loss in a line of runs.jsonl; infinite for a run that failed."""
    return math.inf if record["selection"] is None else float(record["selection"])


def _check(scenario: Scenario, methods: Sequence[str], seeds: Sequence[int], tuning_seeds: Sequence[int]) -> None:
    check_methods(scenario, methods)
    both = sorted(set(seeds) & set(tuning_seeds))
    if both or not seeds or not tuning_seeds:
        raise PlantedError(
            f"seeds {list(seeds)}, tuning seeds {list(tuning_seeds)}: expected at least one of each, and none in both"
        )


def check_methods(scenario: Scenario, methods: Sequence[str]) -> None:
    """Raises PlantedError if a method is unknown or not for this scenario, or if there is none."""
    unknown = [method for method in methods if method not in METHODS]
    if unknown or not methods:
        problem = f"unknown method {', '.join(unknown)}" if unknown else "no method was given"
        raise PlantedError(f"{problem}: expected some of {', '.join(METHODS)}")
    unfit = [method for method in methods if scenario.where not in METHODS[method].where]
    if unfit:
        raise PlantedError(
            f"{', '.join(unfit)} cannot be used in the scenario {scenario.where!r}: leave out these methods"
        )


def check_device(device: str) -> None:
    """Raises PlantedError if PyTorch cannot use the device."""
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:  # unknown, or PyTorch was built without it
        reason = str(error).splitlines()[0]
        raise PlantedError(f"device {device!r}: expected cpu, or a device that PyTorch can use ({reason})") from error
