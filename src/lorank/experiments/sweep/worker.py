"""A worker of a sweep: it takes trials from the queue until none is left, and runs the settings of each."""

from __future__ import annotations

import json
import logging
import math
import os
import socket
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from lorank.config.settings import RunConfig, load_config
from lorank.experiments import folder
from lorank.experiments.errors import RunFolderError
from lorank.experiments.sweep import queue
from lorank.experiments.sweep.plan import Setting, Sweep
from lorank.experiments.sweep.progress import SweepProgress
from lorank.experiments.sweep.results import (
    LOSS,
    OBJECTIVES,
    PARAMETERS,
    RUNS,
    SECONDS,
    WAS_THERE,
    Run,
    figures,
    stored,
)
from lorank.experiments.time_left import duration
from lorank.training.history import read_history

if TYPE_CHECKING:
    from optuna import Study
    from optuna.storages import RDBStorage
    from optuna.trial import Trial, TrialState

    from lorank.experiments.run import RunResult

logger = logging.getLogger("lorank")

TrainRun = Callable[..., "RunResult"]
"""Runs a configuration: `train_run(config, resume=…, console=…, watch=…)`; see `training.train_watched`."""
MAX_MESSAGE = 2000
POLL = 2.0
"""Seconds between two looks at the queue while other workers have the last trials."""


@dataclass(frozen=True)
class _Outcome:
    """What became of a trial: its state, a line for the user, its attributes, and the objectives if it is complete."""

    state: TrialState
    line: str
    attributes: dict[str, Any]
    values: list[float] | None = None


class Worker:
    """Takes trials and runs them.

    Args:
        sweep: the sweep.
        study: its study.
        storage: the study's storage.
        progress: what the user sees.
        console: what the runs print to.
        train_run: runs a configuration; None: the Trainer.
    """

    def __init__(
        self,
        sweep: Sweep,
        study: Study,
        storage: RDBStorage,
        *,
        progress: SweepProgress,
        console: Console,
        train_run: TrainRun | None = None,
    ) -> None:
        self._sweep, self._study, self._storage = sweep, study, storage
        self._progress, self._console = progress, console
        self._train_run = train_run

    def work(self) -> None:
        """Runs trials until every trial of the sweep is finished, stopped early or failed, by whichever worker."""
        seen: set[int] = set()
        told = False
        while True:
            queue.release_stopped(self._study, self._storage, seen)
            trial = queue.take(self._study, self._sweep, self._storage)
            if trial is not None:
                told = False
                self._trial(trial)
                continue
            running = len(queue.unfinished(self._study, self._sweep))
            if not running:
                self.show()
                return
            if not told:
                self._progress.line(
                    f"nothing left to start; waiting for {running} trial{'s' if running > 1 else ''} of other workers"
                )
                told = True
            self._progress.idle(f"waiting for {running} of other workers")
            self.show()
            time.sleep(min(POLL, self._storage.heartbeat_interval or POLL))

    def show(self) -> None:
        """Shows the state of the study."""
        show(self._progress, self._study, self._sweep)

    def _trial(self, trial: Trial) -> None:
        from optuna.exceptions import UpdateFinishedTrialError

        self.show()
        slot = trial.user_attrs[queue.SLOT]
        label = f"{slot + 1} of {self._sweep.count}"
        try:
            with queue.Lease(self._storage, trial) as lease:
                queue.attributes({"worker": f"{socket.gethostname()}, process {os.getpid()}"}, trial)
                outcome = self._outcome(trial, lease)
                queue.attributes(outcome.attributes, trial)
                self._tell(trial, outcome)
            self._progress.line(f"{label}: {self._sweep.label(trial.params)}: {outcome.line}")
        except (queue.TakenOver, UpdateFinishedTrialError):
            self._progress.line(f"{label}: another worker has taken it over, which saw no sign of life of this one")
        except KeyboardInterrupt:
            queue.give_back(self._study, trial, self._storage)
            raise
        self._progress.idle("")

    def _outcome(self, trial: Trial, lease: queue.Lease) -> _Outcome:
        """Runs a trial.

        Raises:
            TakenOver: another worker has it.
        """
        from optuna.exceptions import TrialPruned, UpdateFinishedTrialError
        from optuna.trial import TrialState

        began = time.perf_counter()
        try:
            setting = self._sweep.setting(trial.user_attrs[queue.SLOT], trial.params)
            runs, new = self._runs(setting, trial, lease)
            seconds = time.perf_counter() - began
            line = f"{LOSS} {_mean(runs, LOSS):.4f}, {_mean(runs, PARAMETERS):,.0f} parameters, "
            line += duration(seconds) if new else "finished before"
            return _Outcome(TrialState.COMPLETE, line, _attributes(runs, new, seconds), _values(runs, self._sweep))
        except TrialPruned:
            return _Outcome(TrialState.PRUNED, f"stopped early, its {LOSS} is worse than the median", {})
        except (queue.TakenOver, UpdateFinishedTrialError):
            raise
        except Exception as error:  # any error: the other trials must still be run
            logger.debug("a trial failed", exc_info=True)
            message = f"{type(error).__name__}: {error}"
            return _Outcome(TrialState.FAIL, f"failed {message}", {queue.ERROR: message[:MAX_MESSAGE]})

    def _tell(self, trial: Trial, outcome: _Outcome) -> None:
        try:
            self._study.tell(trial, outcome.values, state=outcome.state)
        except ValueError as error:  # the trial is no longer running
            raise queue.TakenOver from error

    def _runs(self, setting: Setting, trial: Trial, lease: queue.Lease) -> tuple[list[Run], bool]:
        """The runs of a setting, and whether one of them was run now."""
        runs, new = [], False
        for config in setting.runs:
            seed = config.training.seed
            metrics = finished(config)
            if metrics is None:
                lease.check()
                self._progress.run(f"{setting.label}, seed {seed}")
                began = (Path(config.output_dir) / folder.CONFIG).is_file()
                watch = _Watch(trial, lease, self._progress, prunes=self._prunes and config is setting.runs[0])
                metrics = self._train()(config, resume=began, console=self._console, watch=watch).metrics
                new = True
            runs.append(Run(seed, os.path.abspath(config.output_dir), figures(metrics)))
        return runs, new

    @property
    def _prunes(self) -> bool:
        return self._sweep.file.pruner == "median"

    def _train(self) -> TrainRun:
        if self._train_run is None:
            from lorank.experiments.sweep.training import train_watched  # takes seconds

            self._train_run = train_watched
        return self._train_run


class _Watch:
    """Accompanies a run: see `training.Watch`."""

    def __init__(self, trial: Trial, lease: queue.Lease, progress: SweepProgress, *, prunes: bool) -> None:
        self._trial, self._lease, self._progress, self._prunes = trial, lease, progress, prunes

    def step(self, step: int, total: int) -> None:
        self._lease.check()
        self._progress.step(step, total)

    def evaluation(self, step: int, total: int, loss: float) -> None:
        self._progress.loss(loss)
        if not self._prunes or not math.isfinite(loss):
            return
        from optuna.exceptions import TrialPruned

        self._trial.report(loss, step)
        # not in the first half: a method's ranks move there, and its loss is not yet what it will be
        if total / 2 <= step < total and self._trial.should_prune():
            raise TrialPruned


def show(progress: SweepProgress, study: Study, sweep: Sweep) -> None:
    """Shows how many trials of the study are over, and the time left."""
    from optuna.trial import TrialState

    left = queue.unfinished(study, sweep)
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    seconds = [t.user_attrs[SECONDS] for t in complete if SECONDS in t.user_attrs and not t.user_attrs.get(WAS_THERE)]
    workers = sum(trial.state == TrialState.RUNNING for trial in left)
    progress.state(sweep.count - len(left), len(left), seconds, workers)


def finished(config: RunConfig) -> Mapping[str, Any] | None:
    """The metrics of a complete run; None for a run that is not complete.

    Raises:
        RunFolderError: the folder holds another run.
    """
    place = Path(config.output_dir)
    if not (place / folder.CONFIG).is_file():
        return None
    there = load_config(place / folder.CONFIG).model_dump(mode="json", exclude={"output_dir"})
    changed = folder.differences(there, config.model_dump(mode="json", exclude={"output_dir"}))
    if changed:
        raise RunFolderError(
            f"{place} holds a run with another configuration ({'; '.join(changed)}). Name another output_dir for the "
            "sweep, or remove that folder."
        )
    metrics = place / folder.METRICS
    loaded: dict[str, Any] | None = json.loads(metrics.read_text(encoding="utf-8")) if metrics.is_file() else None
    return loaded


def _values(runs: list[Run], sweep: Sweep) -> list[float]:
    """The objectives: means over the seeds. A run that diverged is the worst: Optuna accepts infinity, but not NaN."""
    means = [_mean(runs, OBJECTIVES[name]) for name in sweep.file.objectives]
    return [math.inf if math.isnan(mean) else mean for mean in means]


def _mean(runs: list[Run], name: str) -> float:
    return statistics.fmean(run.figures[name] for run in runs)


def _attributes(runs: list[Run], new: bool, seconds: float) -> dict[str, Any]:
    """What the study, and so optuna-dashboard, shows of a trial besides its parameters and objectives."""
    means = {name: _mean(runs, name) for name in runs[0].figures if all(name in run.figures for run in runs)}
    shown = {name: value for name, value in means.items() if math.isfinite(value)}
    history = Path(runs[0].folder) / folder.HISTORY
    ranks = read_history(history)[-1].ranks if history.is_file() else None
    return {
        **shown,
        "folder": str(Path(runs[0].folder).parent),
        **({"ranks": dict(ranks)} if ranks else {}),
        RUNS: stored(runs),
        SECONDS: round(seconds, 3),
        WAS_THERE: not new,
    }
