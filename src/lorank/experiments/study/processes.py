"""Processes that do trials, each with its share of the cores, and one GPU each if there are several.

Not concurrent.futures: there, all processes have one environment, one killed process ends the whole pool, and the
processes of a parent that was killed stay and go on working.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import sys
import threading
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import TracebackType
from typing import Any

from lorank.experiments.job_environment import THREADS, job_environment

ATTEMPTS = 2
"""How often a trial is begun if its process is killed. After that, the study ends with an error."""

PATIENCE = 10.0
"""Seconds for a process without a trial to end by itself, so that its libraries can clean up."""


@dataclass
class _Worker:
    process: Any
    connection: Connection
    trial: Any = None


class Processes:
    """A context with processes that do trials. At its end, and after an error, all of them are gone.

    Args:
        work: does one trial; it can be pickled.
        count: the largest number of processes. They start when they are needed.
        devices: see :func:`lorank.experiments.study.trials.run_trials`.
        log: the file that receives what the processes print.

    Attributes:
        log: see above.
    """

    def __init__(self, work: Callable[[Any], Any], count: int, *, devices: Sequence[str], log: Path) -> None:
        self.log = log
        self._work, self._count, self._devices = work, count, devices
        self._context = multiprocessing.get_context("spawn")  # a fork of a process with threads may hang
        self._workers: list[_Worker] = []
        self._killed: Counter[str] = Counter()

    def __enter__(self) -> Processes:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for worker in self._workers:
            worker.connection.close()  # ends a process that has no trial
        for worker in self._workers:
            worker.process.join(0 if worker.trial is not None else PATIENCE)
            worker.process.kill()
            worker.process.join()

    @property
    def running(self) -> list[Any]:
        """The trials that are being done."""
        return [worker.trial for worker in self._workers if worker.trial is not None]

    @property
    def free(self) -> int:
        """How many trials can be started now."""
        return self._count - len(self.running)

    def start(self, trial: Any) -> None:
        """Gives a trial to a process that has none."""
        worker = next((worker for worker in self._workers if worker.trial is None), None)
        if worker is None:
            worker = self._new_worker(len(self._workers))
            self._workers.append(worker)
        worker.trial = trial
        with suppress(OSError):  # it was killed meanwhile: wait() sees it
            worker.connection.send(trial)

    def wait(self) -> list[tuple[Any, Any]]:
        """Waits until trials are done, and returns them with what ``work`` returned.

        A trial whose process was killed is begun again in a new process; the second time, its result is None.

        Raises:
            Exception: what ``work`` raised, with the traceback of its process as its cause.
        """
        busy = {worker.connection: worker for worker in self._workers if worker.trial is not None}
        done = []
        for ready in wait(list(busy)):
            assert isinstance(ready, Connection)
            worker = busy[ready]
            trial, worker.trial = worker.trial, None
            try:
                succeeded, value, text = ready.recv()
            except (EOFError, OSError):
                self._replace(worker)
                self._killed[trial.fingerprint] += 1
                if self._killed[trial.fingerprint] >= ATTEMPTS:
                    done.append((trial, None))
                else:
                    self.start(trial)
                continue
            if not succeeded:
                raise value from RuntimeError(f"in the process of {trial.label}:\n{text}")
            done.append((trial, value))
        return done

    def _replace(self, worker: _Worker) -> None:
        worker.connection.close()
        worker.process.kill()
        worker.process.join()
        place = self._workers.index(worker)
        self._workers[place] = self._new_worker(place)

    def _new_worker(self, place: int) -> _Worker:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=_serve, args=(theirs, pickle.dumps(self._work), self.log), daemon=True)
        with job_environment(place, self._count, self._devices):
            process.start()
        theirs.close()
        return _Worker(process, ours)


def _serve(connection: Connection, pickled: bytes, log: Path) -> None:
    """The life of a process: trial after trial, until its parent closes the connection or dies."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the parent ends this one
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with log.open("a", encoding="utf-8") as file:
        sys.stdout.flush()
        sys.stderr.flush()
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    work: Callable[[Any], Any] = pickle.loads(pickled)  # now, since what this imports may print
    if "torch" in sys.modules:  # later loads read the environment
        sys.modules["torch"].set_num_threads(int(os.environ[THREADS[0]]))
    while True:
        try:
            trial = connection.recv()
        except (EOFError, OSError):
            return
        try:
            reply: tuple[bool, Any, str] = True, work(trial), ""
        except Exception as error:
            reply = False, _portable(error), traceback.format_exc()
        try:
            connection.send(reply)
        except OSError:
            return


def _portable(error: Exception) -> Exception:
    """The error, or one with its text if it cannot be sent to another process."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
