"""The planted study: every method is tuned on tuning seeds, then run on the reported seeds. It can be resumed.

Each finished run is one line of runs.jsonl, appended when the run ends. A call runs only what is missing. A line is
valid while the scenario and the method's settings are unchanged; its fingerprint identifies them.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from lorank.errors import LorankError
from lorank.experiments.planted.methods import METHODS
from lorank.experiments.planted.problem import Scenario, make_problem
from lorank.experiments.planted.student import Outcome, train_student
from lorank.files import write_text

RUNS = "runs.jsonl"
_BEGINNING = '{"fingerprint": "'  # of every line
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
        problem = make_problem(self.scenario, self.seed)
        method = METHODS[self.method]
        described = [asdict(self), method.allocator(problem, self.knob).describe(), dict(method.ranks(problem))]
        return hashlib.sha256(json.dumps(described, sort_keys=True, default=str).encode()).hexdigest()[:16]

    @property
    def settings(self) -> tuple[float, Any]:
        """The settings that are tuned: (learning rate, knob)."""
        return self.lr, self.knob


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
    tuning: Mapping[tuple[float, Any], float]
    runs: Mapping[int, Mapping[str, Any]]


def run_trial(trial: Trial, device: str = "cpu") -> dict[str, Any]:
    """Trains one student and returns its line for runs.jsonl. A NaN or infinite loss becomes null."""
    torch.set_num_threads(1)
    logging.getLogger("lorank").setLevel(logging.ERROR)
    problem = make_problem(trial.scenario, trial.seed)
    method = METHODS[trial.method]
    try:
        outcome: Outcome | None = train_student(
            problem, method.ranks(problem), method.allocator(problem, trial.knob), lr=trial.lr, device=device
        )
        failure = None
    except LorankError as error:  # the method diverged or pruned every rank: a result, so the study goes on
        outcome, failure = None, f"{type(error).__name__}: {error}"
    record = {
        "fingerprint": trial.fingerprint,
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
    line: dict[str, Any] = json.loads(json.dumps(record))  # the same types as a line read from the file
    return line


def run_study(
    scenario: Scenario,
    methods: Sequence[str],
    out: Path,
    *,
    seeds: Sequence[int] = SEEDS,
    tuning_seeds: Sequence[int] = TUNING_SEEDS,
    jobs: int = 1,
    device: str = "cpu",
    report: Callable[[int, int, str], None] | None = None,
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
        report: called with (runs done, runs in total, the run that finished last).

    Returns:
        One row per method, in the given order.

    Raises:
        PlantedError: a seed is in both lists, a list is empty, a method is unknown or not for this scenario, or PyTorch
            cannot use the device.
    """
    _check(scenario, methods, seeds, tuning_seeds)
    _check_device(device)
    out.mkdir(parents=True, exist_ok=True)
    known = {record["fingerprint"]: record for record in _read(out / RUNS)}
    tuning = [
        Trial(scenario, method, lr, knob, seed)
        for seed in tuning_seeds  # runs of one problem follow each other, so the problem is made once
        for method in methods
        for lr, knob in METHODS[method].grid
    ]
    total = len(tuning) + len(methods) * len(seeds)
    done = 0

    def carry_out(trials: Sequence[Trial]) -> dict[Trial, dict[str, Any]]:
        nonlocal done
        records = {}
        for trial, record in _carry_out(trials, known, out / RUNS, jobs, device):
            records[trial] = record
            done += 1
            if report is not None:
                report(done, total, f"{trial.method}, lr {trial.lr:g}, seed {trial.seed}")
        return records

    tuned = carry_out(tuning)
    losses: dict[str, dict[tuple[float, Any], float]] = {method: {} for method in methods}
    for method in methods:
        for settings in METHODS[method].grid:
            found = [_loss(r) for t, r in tuned.items() if t.method == method and t.settings == settings]
            losses[method][settings] = sum(found) / len(found)
    best = {method: min(tried, key=lambda settings: tried[settings]) for method, tried in losses.items()}
    final = carry_out([Trial(scenario, method, *best[method], seed) for seed in seeds for method in methods])
    return [
        Row(method, *best[method], losses[method], {t.seed: r for t, r in final.items() if t.method == method})
        for method in methods
    ]


class PlantedError(LorankError):
    """The study cannot be run with these arguments."""


def _carry_out(
    trials: Sequence[Trial], known: dict[str, dict[str, Any]], file: Path, jobs: int, device: str
) -> Iterator[tuple[Trial, dict[str, Any]]]:
    """Yields every trial with its line: first the finished trials, then the new ones, appended to the file."""
    missing = []
    for trial in trials:
        record = known.get(trial.fingerprint)
        if record is None:
            missing.append(trial)
        else:
            yield trial, record

    def keep(record: dict[str, Any]) -> dict[str, Any]:
        with file.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(record) + "\n")
        known[record["fingerprint"]] = record
        return record

    if jobs == 1:
        for trial in missing:
            yield trial, keep(run_trial(trial, device))
        return
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        futures = {pool.submit(run_trial, trial, device): trial for trial in missing}
        for future in as_completed(futures):
            yield futures[future], keep(future.result())


def _read(file: Path) -> list[dict[str, Any]]:
    """All complete lines of the file. A last line that an interruption left incomplete is removed.

    Raises:
        PlantedError: the file is not of such a study. It is unchanged.
    """
    if not file.is_file():
        return []
    text = file.read_text(encoding="utf-8")
    complete = text[: text.rfind("\n") + 1]
    if any(not _BEGINNING.startswith(line[: len(_BEGINNING)]) for line in text.splitlines()):
        raise PlantedError(f"{file} is not of a study of planted ranks: name another folder")
    if text != complete:
        write_text(file, complete)
    return [json.loads(line) for line in complete.splitlines()]


def _loss(record: Mapping[str, Any]) -> float:
    return math.inf if record["selection"] is None else float(record["selection"])


def _check(scenario: Scenario, methods: Sequence[str], seeds: Sequence[int], tuning_seeds: Sequence[int]) -> None:
    unknown = [method for method in methods if method not in METHODS]
    if unknown or not methods:
        problem = f"unknown method {', '.join(unknown)}" if unknown else "no method was given"
        raise PlantedError(f"{problem}: expected some of {', '.join(METHODS)}")
    both = sorted(set(seeds) & set(tuning_seeds))
    if both or not seeds or not tuning_seeds:
        raise PlantedError(
            f"seeds {list(seeds)}, tuning seeds {list(tuning_seeds)}: expected at least one of each, and none in both"
        )
    unfit = [method for method in methods if scenario.where not in METHODS[method].where]
    if unfit:
        raise PlantedError(
            f"{', '.join(unfit)} cannot be used in the scenario {scenario.where!r}: leave out these methods"
        )


def _check_device(device: str) -> None:
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:  # unknown, or PyTorch was built without it
        reason = str(error).splitlines()[0]
        raise PlantedError(f"device {device!r}: expected cpu, or a device that PyTorch can use ({reason})") from error
