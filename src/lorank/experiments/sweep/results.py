"""What came of the trials of a sweep, read from its study."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lorank.experiments.sweep.plan import Sweep, label_of
from lorank.experiments.sweep.queue import ERROR, SLOT, by_slot
from lorank.report.pareto import Point, pareto_front

if TYPE_CHECKING:
    from optuna import Study
    from optuna.trial import FrozenTrial

PARAMETERS, LOSS = "parameters", "validation loss"
OBJECTIVES = {
    "validation_loss": LOSS,
    "parameters": PARAMETERS,
    "total_rank": "total rank",
    "training_seconds": "seconds",
}
"""The figure of each objective."""
RUNS, WAS_THERE, SECONDS = "runs", "was finished before", "seconds of the trial"


@dataclass(frozen=True)
class Run:
    """A finished run.

    Args:
        seed: its `training.seed`.
        folder: the folder with its adapter, on the machine that ran it.
        figures: what the tables show, by name.
    """

    seed: int
    folder: str
    figures: Mapping[str, float]


@dataclass(frozen=True)
class Finished:
    """A finished trial: one setting with all its seeds."""

    number: int
    slot: int
    settings: Mapping[str, Any]
    runs: Sequence[Run]

    @property
    def label(self) -> str:
        """The settings in one line."""
        return label_of(self.settings)

    def mean(self, name: str) -> float:
        """The mean of a figure over the seeds; NaN if a run does not have it."""
        return statistics.fmean(run.figures.get(name, math.nan) for run in self.runs)

    def spread(self, name: str) -> float:
        """The standard deviation of a figure over the seeds; 0 for one seed."""
        return statistics.stdev([run.figures[name] for run in self.runs]) if len(self.runs) > 1 else 0.0


@dataclass(frozen=True)
class SweepResult:
    """The result of a sweep.

    Args:
        sweep: the sweep.
        finished: all finished trials, also of earlier calls and other machines; a grid's in its order, others with the
            best first.
        failures: (label, message) of each trial that failed and was not finished since.
        pruned: labels of the trials that were stopped early.
        new: number of trials that were run and finished during this call, by whichever process.
        unfinished: number of trials that wait or run; not 0 only if workers were stopped.
    """

    sweep: Sweep
    finished: Sequence[Finished]
    failures: Sequence[tuple[str, str]]
    pruned: Sequence[str]
    new: int
    unfinished: int

    @property
    def axes(self) -> tuple[str, str]:
        """The two figures that are compared: the two objectives; with one objective, validation loss and parameters."""
        names = [OBJECTIVES[name] for name in self.sweep.file.objectives]
        return (names[0], names[1]) if len(names) > 1 else (LOSS, PARAMETERS)

    @property
    def front(self) -> list[Finished]:
        """The trials that no other one beats in both figures of `axes`, smallest first."""
        made = dict(zip(map(id, points := self.points()), self.finished, strict=True))
        return [made[id(point)] for point in pareto_front(points)]

    @property
    def best(self) -> Finished | None:
        """The trial with the lowest mean of the first objective."""
        able = [trial for trial in self.finished if math.isfinite(trial.mean(self._first))]
        return min(able, key=lambda trial: trial.mean(self._first), default=None)

    @property
    def _first(self) -> str:
        return OBJECTIVES[self.sweep.file.objectives[0]]

    def points(self) -> list[Point]:
        """One point per setting: the means of the figures of `axes`, and the first one's standard deviation."""
        first, second = self.axes
        return [
            Point(trial.label, trial.mean(second), trial.mean(first), trial.spread(first)) for trial in self.finished
        ]


def figures(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The metrics of one run that the tables show, measured at the end of the run."""
    return {
        LOSS: metrics["validation"]["loss_after"],
        **{f"test {name.replace('_', ' ')}": value for name, value in metrics["test"].items()},
        PARAMETERS: metrics["final"]["trainable_parameters"],
        "total rank": metrics["final"]["ranks"],
        "seconds": metrics["seconds"]["training"],
    }


def collect(study: Study, sweep: Sweep, before: Iterable[int] = ()) -> SweepResult:
    """The state of a study.

    Args:
        study: the study.
        sweep: its sweep.
        before: numbers of trials that were finished when this call began.
    """
    from optuna.trial import TrialState

    finished, failures, pruned, new, earlier = [], [], [], 0, set(before)
    for slot, trials in sorted(by_slot(study).items()):
        if slot >= sweep.count:
            continue
        states = {trial.state: trial for trial in reversed(trials)}  # the first of each state
        if (done := states.get(TrialState.COMPLETE)) is not None:
            finished.append(_finished(done, sweep))
            new += done.number not in earlier and not done.user_attrs[WAS_THERE]
        elif (stopped := states.get(TrialState.PRUNED)) is not None:
            pruned.append(label_of(_settings(stopped, sweep)))
        elif not {TrialState.WAITING, TrialState.RUNNING} & set(states):
            last = trials[-1]
            message = last.user_attrs.get(ERROR, f"its worker stopped {len(trials)} times; see its log")
            failures.append((label_of(_settings(last, sweep)), message))
    if sweep.file.sampler != "grid":
        finished.sort(key=lambda trial: _order(trial.mean(OBJECTIVES[sweep.file.objectives[0]])))
    unfinished = sweep.count - len(finished) - len(failures) - len(pruned)
    return SweepResult(sweep, finished, failures, pruned, new, unfinished)


def done(study: Study) -> list[FrozenTrial]:
    """The finished trials of a study."""
    from optuna.trial import TrialState

    return [t for t in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)) if SLOT in t.user_attrs]


def stored(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Runs as JSON values; NaN and infinity, which JSON does not have, become null."""
    return [
        {"seed": run.seed, "folder": run.folder, "figures": {k: plain(v) for k, v in run.figures.items()}}
        for run in runs
    ]


def _finished(trial: FrozenTrial, sweep: Sweep) -> Finished:
    runs = [
        Run(run["seed"], run["folder"], {k: math.nan if v is None else v for k, v in run["figures"].items()})
        for run in trial.user_attrs[RUNS]
    ]
    return Finished(trial.number, trial.user_attrs[SLOT], _settings(trial, sweep), runs)


def _settings(trial: FrozenTrial, sweep: Sweep) -> dict[str, Any]:
    """The settings of a trial in the order of the file; those that it was given in the queue, if it has no others."""
    given = {**trial.system_attrs.get("fixed_params", {}), **trial.params}
    return {key: values.value(given[key]) for key, values in sweep.space.items() if key in given}


def _order(value: float) -> tuple[bool, float]:
    return (math.isnan(value), value)


def plain(value: float) -> float | None:
    """A number for JSON, which has neither NaN nor infinity: they become null."""
    return value if math.isfinite(value) else None
