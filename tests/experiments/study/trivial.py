"""Trials that only leave a note, for tests of the engine. Importing this takes no time in new processes.

python -m tests.experiments.study.trivial FOLDER TRIALS JOBS     a study in a process of its own
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from lorank.experiments.study.trials import Line, Results, Wanted, run_trials


@dataclass(frozen=True)
class Note:
    """A trial. ``then``: "kill" its process, or "raise", or nothing."""

    name: str
    then: str = ""

    @property
    def fingerprint(self) -> str:
        return self.name

    @property
    def label(self) -> str:
        return f"note {self.name}"

    @property
    def kind(self) -> str:
        return self.name[0]


def note(trial: Note, folder: Path, pause: float = 0.0) -> dict[str, Any]:
    """Adds lines to the folder's notes when it begins and when it ends."""
    with (folder / "notes").open("a") as file:
        file.write(f"begin {trial.name}\n")
    time.sleep(pause)
    if trial.then == "kill" or (trial.then == "kill once" and not (folder / "killed").exists()):
        (folder / "killed").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    if trial.then == "raise":
        raise ValueError(f"cannot do {trial.name}")
    with (folder / "notes").open("a") as file:
        file.write(f"end {trial.name}\n")
    return {
        "value": trial.name,
        "seconds": 2.0,
        "threads": os.environ.get("OMP_NUM_THREADS"),
        "device": os.environ.get("CUDA_VISIBLE_DEVICES"),
        "pid": os.getpid(),
    }


def notes(count: int) -> list[Note]:
    return [Note(f"n{number}") for number in range(count)]


def all_of(trials: list[Note], known: Mapping[str, Line]) -> Wanted:
    return Wanted(trials)


def main() -> None:
    folder, count, jobs = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    work = partial(note, folder=folder, pause=0.15)
    run_trials(partial(all_of, notes(count)), work, Results(folder / "results.jsonl"), jobs=jobs)


if __name__ == "__main__":
    main()
