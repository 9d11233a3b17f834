"""`run_sweep`: workers in this process or in several ones, until every trial of the study is over."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import wait
from types import FrameType
from typing import TYPE_CHECKING

from rich.console import Console

from lorank._version import __version__
from lorank.experiments.job_environment import job_environment, visible_gpus
from lorank.experiments.sweep import queue
from lorank.experiments.sweep.plan import Sweep
from lorank.experiments.sweep.process import start
from lorank.experiments.sweep.progress import SweepProgress
from lorank.experiments.sweep.results import SweepResult, collect, done
from lorank.experiments.sweep.storage import (
    GRACE,
    HEARTBEAT,
    StorageError,
    closing,
    default_url,
    open_storage,
    quiet_optuna,
    shown,
)
from lorank.experiments.sweep.tables import MARKER
from lorank.experiments.sweep.worker import TrainRun, Worker, finished, show
from lorank.files import write_text

if TYPE_CHECKING:
    from optuna import Study
    from optuna.storages import RDBStorage

LOGS = "logs"
Prepare = Callable[[Console], None]


@dataclass(frozen=True)
class Place:
    """Where a sweep keeps its trials.

    Args:
        url: SQLAlchemy's URL of the database.
        study: the name of the study.
        heartbeat: seconds between two signs of life of a running trial.
        grace: seconds without one after which another worker takes the trial.
    """

    url: str
    study: str
    heartbeat: int = HEARTBEAT
    grace: int = GRACE


def place_of(sweep: Sweep, storage: str | None = None, study: str | None = None) -> Place:
    """The storage and the study that were named, or the defaults: SQLite in the sweep's folder, the file's name."""
    return Place(storage or default_url(sweep.out), study or sweep.name)


def run_sweep(
    sweep: Sweep,
    place: Place | None = None,
    *,
    jobs: int = 1,
    console: Console | None = None,
    train_run: TrainRun | None = None,
    prepare: Prepare | None = None,
) -> SweepResult:
    """Runs all unfinished trials of a sweep, together with every other process that has the same storage and study.

    A trial that fails does not end the sweep. It is reported, and the next call tries it again. A trial whose worker is
    killed is taken by another worker after `grace` seconds, and continues from its last checkpoint.

    Args:
        sweep: the sweep from :func:`load_sweep`.
        place: the storage and the study; None: :func:`place_of`.
        jobs: number of worker processes on this machine, at least 1; 1: in this process.
        console: shows the progress; None: standard error.
        train_run: runs a configuration, for tests; None: the Trainer. With several jobs it must be importable.
        prepare: called with its console at the start of every worker process, for example to set up logging.

    Raises:
        StorageError: the storage cannot be used.
        StudyError: the study is of another sweep, or has other settings.
        RunFolderError: a run's folder holds a run with another configuration. No trial was started.
    """
    console = console or Console(stderr=True)
    place = place or place_of(sweep)
    if sweep.file.sampler == "grid":
        for setting in sweep.grid():  # check all folders before the first trial starts
            for run in setting.runs:
                finished(run)
    known = {"study": place.study, "storage": shown(place.url), "lorank": __version__}
    storage = open_storage(place.url, heartbeat=place.heartbeat, grace=place.grace)
    with _database_errors(place), closing(storage):
        write_text(sweep.out / MARKER, json.dumps(known, indent=2) + "\n")
        study = queue.open_study(sweep, storage, place.study)
        before = [trial.number for trial in done(study)]
        with SweepProgress(console, sweep.count) as progress:
            show(progress, study, sweep)
            if jobs == 1:
                _work(sweep, study, storage, progress, train_run)
            else:
                with _terminate_as_interrupt():
                    _run_workers(sweep, study, place, min(jobs, sweep.count), progress, train_run, prepare)
        return collect(study, sweep, before)


def _work(
    sweep: Sweep,
    study: Study,
    storage: RDBStorage,
    progress: SweepProgress,
    train_run: TrainRun | None,
    console: Console | None = None,
) -> None:
    if sweep.file.pruner == "median":
        from optuna.pruners import MedianPruner

        study.pruner = MedianPruner()
    with open(os.devnull, "w") as nowhere, _terminate_as_interrupt():
        # the bars show what a run would print
        runs = console or Console(file=nowhere)
        Worker(sweep, study, storage, progress=progress, console=runs, train_run=train_run).work()


@contextmanager
def _terminate_as_interrupt() -> Iterator[None]:
    """SIGTERM, which clusters send before they stop a machine, returns the trial to the queue as Ctrl-C does."""

    def interrupt(_: int, __: FrameType | None) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _run_workers(
    sweep: Sweep,
    study: Study,
    place: Place,
    jobs: int,
    progress: SweepProgress,
    train_run: TrainRun | None,
    prepare: Prepare | None,
) -> None:
    """Starts worker processes and shows the state of the study until all have ended."""
    context = multiprocessing.get_context("spawn")
    gpus, workers = visible_gpus(), []
    logs = sweep.out / LOGS
    for number in range(jobs):
        log = logs / f"{socket.gethostname()}-{os.getpid()}-{number}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        with job_environment(number, jobs, gpus):
            job = pickle.dumps(partial(_worker, sweep, place, train_run, prepare))
            worker = context.Process(target=start, args=(job, str(log)), name=f"worker {number}", daemon=True)
            worker.start()
            workers.append((worker, log))
    progress.line(f"{jobs} workers; what they print is in {logs}")
    told: set[int] = {trial.number for trial in done(study)}
    alive = list(workers)
    try:
        while alive:
            wait([worker.sentinel for worker, _ in alive], timeout=1.0)
            show(progress, study, sweep)
            _tell_new(study, sweep, progress, told)
            for worker, log in [pair for pair in alive if not pair[0].is_alive()]:
                alive = [pair for pair in alive if pair[0] is not worker]
                if worker.exitcode:
                    how = f"signal {-worker.exitcode}" if worker.exitcode < 0 else f"status {worker.exitcode}"
                    rest = f"; {place.grace} s later another one takes its trial" if alive else ""
                    progress.line(f"{worker.name} ended with {how}{rest}. See {log}")
        _tell_new(study, sweep, progress, told)
    finally:
        for worker, _ in alive:
            worker.terminate()  # it returns its trial to the queue
        for worker, _ in alive:
            worker.join(timeout=30)


def _tell_new(study: Study, sweep: Sweep, progress: SweepProgress, told: set[int]) -> None:
    """One line for each trial that has finished since the last call."""
    for trial in collect(study, sweep).finished:
        if trial.number not in told:
            told.add(trial.number)
            loss, size = trial.mean("validation loss"), trial.mean("parameters")
            progress.line(
                f"{trial.slot + 1} of {sweep.count}: {trial.label}: validation loss {loss:.4f}, {size:,.0f} parameters"
            )


def _worker(sweep: Sweep, place: Place, train_run: TrainRun | None, prepare: Prepare | None) -> None:
    """The work of a worker process. What it prints goes to its log."""
    import optuna

    console = Console(width=120)
    if prepare is not None:
        prepare(console)
    try:
        with closing(open_storage(place.url, heartbeat=place.heartbeat, grace=place.grace)) as storage:
            with quiet_optuna():
                study = optuna.load_study(storage=storage, study_name=place.study)
            _work(sweep, study, storage, SweepProgress(console, sweep.count), train_run, console)
    except KeyboardInterrupt:
        console.print("interrupted; the trial is back in the queue")
        sys.exit(130)


@contextmanager
def _database_errors(place: Place) -> Iterator[None]:
    """Says in one message that the database can no longer be used."""
    from optuna.exceptions import StorageInternalError
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (SQLAlchemyError, StorageInternalError) as error:
        reason = " ".join(str(error.__cause__ or error).split("\n")[0].split())
        raise StorageError(
            f"--storage {shown(place.url)} can no longer be used: {reason}. The same command continues: finished "
            "trials are kept, and interrupted runs continue from their last checkpoint."
        ) from error
