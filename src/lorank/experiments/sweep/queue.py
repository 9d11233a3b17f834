"""The trials of a study as a queue: every trial of the sweep is a numbered slot, and one worker at a time has it.

Optuna's own samplers may give one grid point to two workers, and a worker that finds no waiting trial makes a new one.
So all slots of a sweep are queued when it begins, with their parameters for a grid and without any for a sampler that
chooses them. Workers only take what waits:

- A database changes a trial from waiting to running for one worker only.
- If a slot is in the queue twice (two processes filled it at the same time), the trial with the lower number has it: of
  the trials of a slot that have not failed, only the first is run. A failed trial never returns, so this cannot change.
- A running trial gives signs of life. If they stop, any worker declares it failed, and Optuna queues its slot again.
"""

from __future__ import annotations

import random
import threading
import time
from collections import defaultdict
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

from lorank.errors import LorankError
from lorank.experiments import folder
from lorank.experiments.sweep.plan import Sweep
from lorank.experiments.sweep.storage import quiet_optuna, shown

if TYPE_CHECKING:
    from optuna import Study
    from optuna.samplers import BaseSampler
    from optuna.storages import RDBStorage
    from optuna.trial import FrozenTrial, Trial

SLOT, ERROR, DUPLICATE = "slot", "error", "duplicate of trial"
_FINGERPRINT = "lorank sweep"


class StudyError(LorankError):
    """The study of this name is of another sweep."""


class TakenOver(Exception):
    """Another worker has this trial now: it saw no sign of life of ours."""


def open_study(sweep: Sweep, storage: RDBStorage, name: str) -> Study:
    """Opens the study of a sweep, or begins it, and queues every slot that is neither finished, nor running, nor
    waiting: those of a new study, those that failed, and those of a larger `trials`.

    Raises:
        StudyError: the study has other settings. Nothing was changed.
    """
    import optuna

    with quiet_optuna():
        try:
            directions = [optuna.study.StudyDirection.MINIMIZE for _ in sweep.file.objectives]
            study = optuna.create_study(storage=storage, study_name=name, directions=directions)
            study.set_metric_names(list(sweep.file.objectives))
            there = None
        except optuna.exceptions.DuplicatedStudyError:
            study = optuna.load_study(storage=storage, study_name=name)
            there = _settings_of(study)
            _check_same(study, sweep, there, shown(storage.url))
    _fill(study, sweep)
    if there is None:
        study.set_user_attr(_FINGERPRINT, sweep.fingerprint())  # last: a process that waits for it finds a full queue
    return study


def _settings_of(study: Study) -> dict[str, Any] | None:
    """The settings with which the study was begun. None: its process stopped while it filled the queue."""
    for _ in range(100):  # it may be filling it at this moment
        if (there := study.user_attrs.get(_FINGERPRINT)) is not None:
            return dict(there)
        time.sleep(0.1)
    return None


def _check_same(study: Study, sweep: Sweep, there: dict[str, Any] | None, where: str) -> None:
    if there is None:
        if all(SLOT in trial.user_attrs for trial in study.get_trials(deepcopy=False)):
            return
        raise StudyError(
            f"the study {study.study_name!r} in {where} is not of a lorank sweep: name another one (--study)."
        )
    changed = folder.differences(there, sweep.fingerprint())
    if changed:
        lines = "\n".join(f"  {line}" for line in changed)
        raise StudyError(
            f"the study {study.study_name!r} in {where} was begun with other settings:\n{lines}\nBegin another study "
            "(--study NAME): runs that are finished in the folder are not run again. Or name another output_dir."
        )


def _fill(study: Study, sweep: Sweep) -> None:
    from optuna.trial import TrialState

    points, slots = sweep.points, by_slot(study)
    for slot in range(sweep.count):
        trials = slots.get(slot, ())
        if all(trial.state == TrialState.FAIL for trial in trials):
            known = [trial.params for trial in trials if len(trial.params) == len(sweep.space)]
            study.enqueue_trial(points[slot] if points else known[-1] if known else {}, user_attrs={SLOT: slot})


def by_slot(study: Study) -> dict[int, list[FrozenTrial]]:
    """The trials of every slot in the order in which they were made."""
    slots = defaultdict(list)
    for trial in study.get_trials(deepcopy=False):
        if SLOT in trial.user_attrs and DUPLICATE not in trial.user_attrs:
            slots[trial.user_attrs[SLOT]].append(trial)
    return slots


def take(study: Study, sweep: Sweep, storage: RDBStorage) -> Trial | None:
    """The next waiting trial, which from now on is running and ours; None if none waits. Its parameters are set."""
    from optuna.exceptions import UpdateFinishedTrialError
    from optuna.trial import Trial, TrialState

    for waiting in study.get_trials(deepcopy=False, states=(TrialState.WAITING,)):
        slot = waiting.user_attrs.get(SLOT)
        if slot is None or slot >= sweep.count:
            continue
        number = waiting._trial_id  # the storage's name for it; it has no public accessor
        try:
            if not storage.set_trial_state_values(number, TrialState.RUNNING):
                continue  # another worker was faster
        except UpdateFinishedTrialError:
            continue  # and has even finished it
        storage.record_heartbeat(number)
        first = next(trial for trial in by_slot(study)[slot] if trial.state != TrialState.FAIL)
        if first.number < waiting.number:
            storage.set_trial_user_attr(number, DUPLICATE, first.number)
            storage.set_trial_state_values(number, TrialState.FAIL)
            continue
        # a sampler of its own for every slot: its choices do not depend on which worker asks
        study.sampler = _sampler(sweep, slot)
        trial = Trial(study, number)
        for name, dimension in sweep.space.items():
            dimension.suggest(trial, name)
        return trial
    return None


def _sampler(sweep: Sweep, slot: int) -> BaseSampler:
    from optuna.samplers import RandomSampler, TPESampler

    seed = random.Random(f"{sweep.file.sampler_seed}/{slot}").randrange(2**31)
    if sweep.file.sampler == "tpe":
        return TPESampler(seed=seed, constant_liar=True)  # it counts running trials as bad, so workers spread out
    return RandomSampler(seed=seed)


def release_stopped(study: Study, storage: RDBStorage, seen: set[int]) -> None:
    """Declares trials without signs of life failed; Optuna queues them again.

    Args:
        study: the study.
        storage: its storage.
        seen: the running trials that this process has seen before; it is updated. A worker that is killed just after it
            took a trial leaves no sign of life at all, and Optuna would wait for it for ever. So a process that sees a
            running trial for the first time gives one for it.
    """
    from optuna.storages import fail_stale_trials
    from optuna.trial import TrialState

    with quiet_optuna():
        fail_stale_trials(study)
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        if trial._trial_id not in seen:
            seen.add(trial._trial_id)
            storage.record_heartbeat(trial._trial_id)


def give_back(study: Study, trial: Trial, storage: RDBStorage) -> None:
    """Queues the slot of a running trial again: the user or the system stopped its worker."""
    from optuna.storages import RetryHeartbeatStaleTrialCallback
    from optuna.trial import TrialState

    if storage.set_trial_state_values(trial._trial_id, TrialState.FAIL):
        with quiet_optuna():
            RetryHeartbeatStaleTrialCallback()(study, storage.get_trial(trial._trial_id))


class Lease:
    """Signs of life of a running trial, given by a thread while the context lasts.

    Args:
        storage: the study's storage.
        trial: the running trial.
    """

    def __init__(self, storage: RDBStorage, trial: Trial) -> None:
        self._storage, self._id = storage, trial._trial_id
        self._interval = storage.heartbeat_interval or 1
        self._grace = storage.grace_period or 2 * self._interval
        self._last, self._taken, self._stop = time.time(), False, threading.Event()
        self._thread = threading.Thread(target=self._live, daemon=True)

    def __enter__(self) -> Lease:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def check(self) -> None:
        """Raises TakenOver if another worker has the trial, for example because this machine was asleep."""
        if time.time() - self._last > self._grace:
            self._sign()
        if self._taken:
            raise TakenOver

    def _live(self) -> None:
        while not self._taken:
            self._sign()
            if self._stop.wait(self._interval):
                break
        self._storage.remove_session()

    def _sign(self) -> None:
        from optuna.exceptions import StorageInternalError
        from optuna.trial import TrialState
        from sqlalchemy.exc import SQLAlchemyError

        try:
            if self._storage.get_trial(self._id).state == TrialState.RUNNING:
                self._storage.record_heartbeat(self._id)
                self._last = time.time()
            else:
                self._taken = True
        except (SQLAlchemyError, StorageInternalError):
            pass  # the database cannot be reached at present; the run itself does not need it


def attributes(values: dict[str, Any], trial: Trial) -> None:
    """Sets user attributes of a trial, as optuna-dashboard shows them."""
    for key, value in values.items():
        trial.set_user_attr(key, value)


def unfinished(study: Study, sweep: Sweep) -> Sequence[FrozenTrial]:
    """The trials of the sweep that wait or run, at most one per slot."""
    from optuna.trial import TrialState

    live = (TrialState.WAITING, TrialState.RUNNING)
    done = (TrialState.COMPLETE, TrialState.PRUNED)
    return [
        next(trial for trial in trials if trial.state in live)
        for slot, trials in by_slot(study).items()
        if slot < sweep.count
        and any(trial.state in live for trial in trials)
        and not any(trial.state in done for trial in trials)
    ]
