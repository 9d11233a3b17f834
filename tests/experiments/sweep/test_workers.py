"""Several processes share the trials of a study; one of them is killed."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import optuna
import psutil
import pytest
from rich.console import Console

from lorank.experiments.sweep import Sweep, load_sweep, queue, run_sweep
from lorank.experiments.sweep.jobs import Place, place_of
from lorank.experiments.sweep.results import LOSS, RUNS, WAS_THERE, Run, collect, stored
from lorank.experiments.sweep.storage import MAX_RETRIES
from tests.experiments.sweep import postgres
from tests.experiments.sweep.fakes import CALLS, GRACE, HEARTBEAT, fast, slow

Write = Callable[..., Path]
Open = Callable[..., Any]
StudyOf = Callable[..., optuna.Study]
FORK = multiprocessing.get_context("fork")  # a new interpreter would import torch and PEFT again, for seconds


def _main(sweep: Sweep, place: Place, train_run: Any) -> None:
    run_sweep(sweep, place, console=Console(file=io.StringIO()), train_run=train_run)


def start(sweep: Sweep, place: Place, train_run: Any = slow) -> BaseProcess:
    process = FORK.Process(target=_main, args=(sweep, place, train_run))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of threads: torch has some
        process.start()
    return process


def until(condition: Callable[[], Any], seconds: float = 60) -> Any:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if value := condition():
            return value
        time.sleep(0.02)
    raise AssertionError("it did not happen in time")


def calls(sweep: Sweep) -> list[list[str]]:
    path = sweep.out / CALLS
    return [line.split() for line in path.read_text().splitlines()] if path.is_file() else []


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'shared.db'}"
        return
    if reason := postgres.reason_against():
        pytest.skip(reason)
    with postgres.server() as url:
        yield url


def test_two_workers_share_a_study_and_one_is_killed(write: Write, url: str, study_of: StudyOf) -> None:
    sweep = load_sweep(write(space={"lora.r": [1, 2, 3, 4], "training.lr": [0.01, 0.1]}, seeds=[0]))
    sweep.out.mkdir()
    place = Place(url, "shared", HEARTBEAT, GRACE)
    workers = [start(sweep, place), start(sweep, place)]  # at the same moment, so both make the tables and the queue
    victim = workers[0]

    def of_victim(what: str) -> list[str]:
        return [name for kind, pid, name in calls(sweep) if kind == what and int(pid) == victim.pid]

    until(lambda: len(of_victim("start")) >= 2)
    assert victim.pid is not None
    os.kill(victim.pid, signal.SIGKILL)
    victim.join()
    workers[1].join(60)
    assert (victim.exitcode, workers[1].exitcode) == (-signal.SIGKILL, 0)

    study = study_of(place)
    slots = queue.by_slot(study)
    assert sorted(slots) == list(range(8))
    complete = Counter(slot for slot, trials in slots.items() for t in trials if t.state.name == "COMPLETE")
    assert complete == dict.fromkeys(range(8), 1)
    # no run came to its end twice, and only the one that was killed began twice
    assert max(Counter(name for what, _, name in calls(sweep) if what == "end").values()) == 1
    starts = Counter(name for what, _, name in calls(sweep) if what == "start")
    assert len(starts) == 8
    assert {name for name, count in starts.items() if count > 1} == set(of_victim("start")) - set(of_victim("end"))
    retried = [t for t in study.trials if "failed_trial" in t.system_attrs]
    assert [study.trials[t.system_attrs["failed_trial"]].state.name for t in retried] == ["FAIL"]
    assert len(retried) == 1
    result = collect(study, sweep)
    assert (len(result.finished), result.failures, result.unfinished) == (8, [], 0)


def test_a_killed_run_continues_from_its_checkpoint(write: Write, values: dict[str, Any]) -> None:
    base = {key: value for key, value in values.items() if key != "output_dir"}
    sweep = load_sweep(write(base=base, space={"training.lr": [3e-3]}, seeds=[0]))
    place = Place(place_of(sweep).url, sweep.name, HEARTBEAT, 1)
    out = Path(sweep.grid()[0].runs[0].output_dir)

    from lorank.experiments.sweep.training import train_watched

    def to_be_killed(config: Any, *, watch: Any, **options: Any) -> Any:
        step = watch.step

        def waits(number: int, total: int) -> None:
            step(number, total)
            if number == 6:  # after the checkpoint of step 4
                (sweep.out / "killed here").touch()
                time.sleep(60)

        watch.step = waits
        return train_watched(config, watch=watch, **options)

    child = start(sweep, place, to_be_killed)
    until((sweep.out / "killed here").is_file)
    assert child.pid is not None
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    result = run_sweep(sweep, place, console=Console(file=io.StringIO()))
    assert (len(result.finished), result.new, result.failures) == (1, 1, [])
    assert json.loads((out / "metrics.json").read_text())["resumed_from_step"] == 4


def test_jobs_run_in_worker_processes(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep = load_sweep(write(space={"lora.r": [1, 2, 3, 4]}, seeds=[0]))
    assert pickle.loads(pickle.dumps(sweep)) == sweep  # a spawned worker gets it this way
    monkeypatch.setattr(multiprocessing, "get_context", lambda _: FORK)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    sweep.out.mkdir()
    console = Console(file=io.StringIO(), width=200)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        result = run_sweep(sweep, jobs=2, console=console, train_run=slow)
    assert (result.new, result.unfinished, result.failures) == (4, 0, [])
    assert len({pid for _, pid, _ in calls(sweep)}) == 2
    assert str(os.getpid()) not in {pid for _, pid, _ in calls(sweep)}
    shown = console.file.getvalue()
    assert f"2 workers; what they print is in {sweep.out / 'logs'}" in shown
    assert "4 of 4: r=4: validation loss" in shown
    assert "OMP_NUM_THREADS" not in os.environ


def test_a_terminated_worker_puts_its_trial_back(write: Write, study_of: StudyOf) -> None:
    sweep = load_sweep(write(space={"lora.r": [1, 2]}, seeds=[0]))
    sweep.out.mkdir()
    worker = start(sweep, place_of(sweep))
    until(lambda: calls(sweep))
    worker.terminate()
    worker.join(30)
    assert worker.exitcode == 1  # it ends by the KeyboardInterrupt that the command turns into a message
    states = [(trial.user_attrs[queue.SLOT], trial.state.name) for trial in study_of(place_of(sweep)).trials]
    assert states == [(0, "FAIL"), (1, "WAITING"), (0, "WAITING")]


def _dies(config: Any, **options: Any) -> Any:
    if config.lora.r == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return fast(config, **options)


ORPHAN = """
import multiprocessing, pickle, sys, time
from functools import partial
from lorank.experiments.sweep.process import start

job = pickle.dumps(partial(exec, "print('begun', flush=True); import time; time.sleep(60)"))
worker = multiprocessing.get_context("spawn").Process(target=start, args=(job, sys.argv[1]))
worker.start()
print(worker.pid, flush=True)
time.sleep(60)
"""


def test_a_worker_ends_when_its_parent_is_killed(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with subprocess.Popen([sys.executable, "-c", ORPHAN, str(log)], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        worker = psutil.Process(int(parent.stdout.readline()))
        until(lambda: log.is_file() and log.read_text() == "begun\n")
        parent.kill()

    def ended() -> bool:
        try:
            return not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True

    until(ended, seconds=20)


def test_a_worker_that_dies_is_told_and_the_others_go_on(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep = load_sweep(write(space={"lora.r": [1, 2, 3]}, seeds=[0]))
    monkeypatch.setattr(multiprocessing, "get_context", lambda _: FORK)
    console = Console(file=io.StringIO(), width=300)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        result = run_sweep(sweep, Place(place_of(sweep).url, "s", 1, 1), jobs=2, console=console, train_run=_dies)
    assert console.file.getvalue().count("ended with signal 9") == 2  # each has tried it
    assert (len(result.finished), result.unfinished) == (2, 1)


@pytest.fixture
def begun(write: Write, open_: Open) -> tuple[Sweep, Any, optuna.Study]:
    """A sweep of three trials whose queue is full, its storage and its study."""
    sweep = load_sweep(write(space={"lora.r": [1, 2, 3]}, seeds=[0]))
    storage = open_(place_of(sweep).url)
    return sweep, storage, queue.open_study(sweep, storage, "s")


def test_a_slot_that_is_queued_twice_is_run_once(begun: tuple[Sweep, Any, optuna.Study]) -> None:
    sweep, storage, study = begun
    for slot, point in enumerate(sweep.points):
        study.enqueue_trial(point, user_attrs={queue.SLOT: slot})
    numbers = []
    while trial := queue.take(study, sweep, storage):
        numbers.append(trial.number)
        if trial.number != 1:
            study.tell(trial, 1.0)
    assert numbers == [0, 1, 2]  # trial 1 is still running while its twin, 4, is looked at
    assert [trial.user_attrs.get(queue.DUPLICATE) for trial in study.trials] == [None, None, None, 0, 1, 2]
    assert [trial.state.name for trial in study.trials] == ["COMPLETE", "RUNNING", "COMPLETE", "FAIL", "FAIL", "FAIL"]


def test_a_trial_that_never_gave_a_sign_of_life_is_retried(begun: tuple[Sweep, Any, optuna.Study]) -> None:
    _, storage, study = begun
    dead = study.get_trials()[0]._trial_id
    storage.set_trial_state_values(dead, optuna.trial.TrialState.RUNNING)  # and its worker is killed here
    seen: set[int] = set()

    def retried() -> bool:
        queue.release_stopped(study, storage, seen)
        return study.get_trials()[0].state.name == "FAIL"

    until(retried)
    assert [trial.user_attrs[queue.SLOT] for trial in study.trials if trial.state.name == "WAITING"] == [1, 2, 0]


def test_a_trial_that_kills_every_worker_is_given_up(begun: tuple[Sweep, Any, optuna.Study]) -> None:
    sweep, storage, study = begun
    taken = 0
    while trial := queue.take(study, sweep, storage):
        if trial.user_attrs[queue.SLOT] != 1:
            queue.attributes({RUNS: stored([Run(0, "", {LOSS: 1.0})]), WAS_THERE: False}, trial)
            study.tell(trial, 1.0)
            continue
        taken += 1
        seen = {trial._trial_id}

        def given_up(number: int = trial.number, seen: set[int] = seen) -> bool:
            queue.release_stopped(study, storage, seen)
            return study.trials[number].state.name == "FAIL"

        until(given_up)
    result = collect(study, sweep)
    assert result.failures == [("r=2", "its worker stopped 4 times; see its log")]
    assert taken == 1 + MAX_RETRIES
    assert [trials[-1].state.name for trials in queue.by_slot(study).values()] == ["COMPLETE", "FAIL", "COMPLETE"]


def test_a_worker_stops_when_another_one_has_its_trial(begun: tuple[Sweep, Any, optuna.Study]) -> None:
    sweep, storage, study = begun
    trial = queue.take(study, sweep, storage)
    assert trial is not None
    with queue.Lease(storage, trial) as lease:
        lease.check()
        storage.set_trial_state_values(trial._trial_id, optuna.trial.TrialState.FAIL)

        def noticed() -> bool:
            try:
                lease.check()
            except queue.TakenOver:
                return True
            return False

        until(noticed, seconds=10)


def test_a_result_that_comes_too_late_does_not_count(write: Write, open_: Open, study_of: StudyOf) -> None:
    sweep = load_sweep(write(space={"lora.r": [1]}, seeds=[0]))
    place = place_of(sweep)
    storage = open_(place.url)
    lines = Console(file=io.StringIO(), width=200)
    taken = []

    def overtaken(config: Any, **options: Any) -> Any:
        if not taken:
            taken.append(1)
            study = optuna.load_study(storage=storage, study_name=place.study)
            [running] = study.get_trials(states=(optuna.trial.TrialState.RUNNING,))
            queue.give_back(study, optuna.trial.Trial(study, running._trial_id), storage)
        return fast(config, **options)

    result = run_sweep(sweep, place, console=lines, train_run=overtaken)
    assert "another worker has taken it over" in lines.file.getvalue()
    assert (len(result.finished), result.unfinished) == (1, 0)
    study = study_of(place)
    assert [trial.state.name for trial in study.trials] == ["FAIL", "COMPLETE"]
