"""Trials and their lines of results. A study can be interrupted at any moment, also by a kill, and continues later.

A *plan* is a function of the results so far: it names the trials that are wanted. So later trials can depend on earlier
ones, such as the test runs at a learning rate that is chosen first. After every result the plan is asked again.

Each finished trial is one line of a JSONL file. The line begins with the trial's fingerprint, which identifies
everything that decides the result. A trial whose fingerprint is in the file is not run again. Only the process that
holds the lock of the file starts trials and adds lines; the system frees the lock if this process dies. A last line
that a kill has cut is removed, and its trial is run again.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from lorank.errors import LorankError
from lorank.experiments.study.processes import Processes
from lorank.files import append_text, write_text

Line = Mapping[str, Any]
_BEGINNING = '{"fingerprint": "'  # of every line


class StudyError(LorankError):
    """A study cannot be run: its file belongs to something else or is in use, or its processes are killed."""


class Trial(Protocol):
    """One run of a study. It can be pickled."""

    @property
    def fingerprint(self) -> str:
        """A hash of everything that decides the result, except the code."""

    @property
    def label(self) -> str:
        """The trial in a few words, for progress."""

    @property
    def kind(self) -> str:
        """Trials of one kind take about the same time."""


@dataclass(frozen=True)
class Wanted:
    """What a plan asks for.

    Args:
        trials: the trials in the order to run them, finished ones too.
        later: the number of further trials that depend on results that are not there yet.
        kinds: the kinds of these later trials, for the time left. One entry per trial, or empty.
    """

    trials: Sequence[Trial]
    later: int = 0
    kinds: Sequence[str] = ()


Plan = Callable[[Mapping[str, Line]], Wanted]


@dataclass(frozen=True)
class Progress:
    """How far a study is.

    Args:
        done: finished trials, those of earlier calls included.
        total: trials in all, as far as known.
        last: the label of the trial that finished last; empty at the beginning.
        seconds_left: an estimate from the finished trials; None: none is finished yet.
    """

    done: int
    total: int
    last: str
    seconds_left: float | None


class Results:
    """The file with the lines of a study.

    Args:
        path: the JSONL file; it and its folder need not exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Holds the file for this process.

        Raises:
            StudyError: another living process holds it.
        """
        from filelock import FileLock, Timeout  # torch depends on it

        self.path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.path.with_name(f".{self.path.name}.lock"))
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise StudyError(
                f"another process is adding to {self.path}: wait until it ends, or name another folder"
            ) from None
        try:
            yield
        finally:
            lock.release()

    def read(self, *, repair: bool = False) -> dict[str, Line]:
        """All complete lines, by fingerprint.

        Args:
            repair: also remove a last line that a kill has cut from the file. Only for the holder of the lock.

        Raises:
            StudyError: the file is of something else. It is unchanged.
        """
        if not self.path.is_file():
            return {}
        text = self.path.read_text(encoding="utf-8", errors="replace")
        complete = text[: text.rfind("\n") + 1]
        if any(not _BEGINNING.startswith(line[: len(_BEGINNING)]) for line in text.splitlines()):
            raise StudyError(f"{self.path} does not hold the runs of a study: name another folder")
        try:
            lines = [json.loads(line) for line in complete.splitlines()]
        except ValueError as error:
            raise StudyError(f"{self.path} is damaged ({error}): remove its broken line, or the file") from error
        if repair and text != complete:
            write_text(self.path, complete)
        return {line["fingerprint"]: line for line in lines}

    def add(self, trial: Trial, line: Line) -> Line:
        """Appends the line of a trial, flushed to disk. Returns it as a reader of the file gets it."""
        text = json.dumps({"fingerprint": trial.fingerprint, **line})
        append_text(self.path, text + "\n")
        read: Line = json.loads(text)
        return read


def run_trials(
    plan: Plan,
    work: Callable[[Any], Mapping[str, Any]],
    results: Results,
    *,
    jobs: int = 1,
    devices: Sequence[str] = (),
    report: Callable[[Progress], None] | None = None,
) -> dict[str, Line]:
    """Runs the trials of a plan that are not finished, until the plan wants no more.

    Args:
        plan: see the module.
        work: does one trial and returns its line, without the fingerprint. It can be pickled. Its time is ``seconds``
            in the line, if given, for the estimate of the time left.
        results: the file of the lines.
        jobs: the number of processes. 1: this process. More: new processes, each with its share of the cores. ≥ 1.
        devices: numbers of the GPUs; each new process sees one of them, in turn. Empty: all processes see all devices.
        report: is called at the beginning and after each trial.

    Returns:
        All lines of the file, by fingerprint.

    Raises:
        StudyError: the file cannot be used, or a process was killed twice while it did the same trial.
        Exception: what ``work`` raises. Finished trials stay finished.
    """
    with results.locked():
        known = results.read(repair=True)
        last = ""

        def tell(wanted: Wanted) -> None:
            if report is not None:
                report(_progress(wanted, known, last, jobs))

        if jobs == 1:
            while True:
                wanted = plan(known)
                tell(wanted)
                todo = _missing(wanted, known)
                if not todo:
                    return known
                trial = todo[0]
                known[trial.fingerprint] = results.add(trial, work(trial))
                last = trial.label
        with Processes(work, jobs, devices=devices, log=results.path.with_suffix(".log")) as processes:
            while True:
                wanted = plan(known)
                tell(wanted)
                running = {trial.fingerprint for trial in processes.running}
                todo = [trial for trial in _missing(wanted, known) if trial.fingerprint not in running]
                for trial in todo[: processes.free]:
                    processes.start(trial)
                if not processes.running:
                    return known
                for trial, line in processes.wait():
                    if line is None:
                        raise StudyError(
                            f"the process that ran {trial.label} was killed, twice, perhaps for lack of memory: give "
                            f"fewer --jobs. Finished runs are kept. Its output: {processes.log}"
                        )
                    known[trial.fingerprint] = results.add(trial, line)
                    last = trial.label


def _missing(wanted: Wanted, known: Mapping[str, Line]) -> list[Trial]:
    unique: dict[str, Trial] = {}
    for trial in wanted.trials:
        unique.setdefault(trial.fingerprint, trial)
    return [trial for name, trial in unique.items() if name not in known]


def _progress(wanted: Wanted, known: Mapping[str, Line], last: str, jobs: int) -> Progress:
    trials = {trial.fingerprint: trial for trial in wanted.trials}
    missing = [trial.kind for name, trial in trials.items() if name not in known]
    later = [*wanted.kinds, *[""] * (wanted.later - len(wanted.kinds))]
    left = seconds_left([*missing, *later], trials, known)
    return Progress(
        done=len(trials) - len(missing),
        total=len(trials) + wanted.later,
        last=last,
        seconds_left=None if left is None else left / min(jobs, max(1, len(missing) + len(later))),
    )


def seconds_left(kinds: Sequence[str], trials: Mapping[str, Trial], known: Mapping[str, Line]) -> float | None:
    """The time for trials of these kinds, one after the other, from the times of finished ones.

    A kind of which none is finished takes the mean of all. None: nothing is finished.
    """
    times: dict[str, list[float]] = {}
    for name, trial in trials.items():
        seconds = known.get(name, {}).get("seconds")
        if seconds is not None:
            times.setdefault(trial.kind, []).append(float(seconds))
    if not times:
        return None
    means = {kind: statistics.fmean(values) for kind, values in times.items()}
    overall = statistics.fmean(means.values())
    return sum(means.get(kind, overall) for kind in kinds)
