"""What a sweep shows while it runs: a bar over its trials with the time left, a bar for the run in this process."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from types import TracebackType

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, SpinnerColumn, Task, TextColumn
from rich.text import Text

from lorank.experiments.time_left import duration


class SweepProgress:
    """Bars on a terminal; elsewhere one line per trial. Used as a context.

    Args:
        console: the console to write to.
        total: number of trials of the sweep.
    """

    def __init__(self, console: Console, total: int) -> None:
        self.console = console
        self._bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            _Note(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._trials = self._bar.add_task("Trials", total=total, note="", end=None)
        self._run = self._bar.add_task("", total=None, note="", end=None, visible=False)
        self._told = False

    def __enter__(self) -> SweepProgress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def line(self, text: str) -> None:
        """Prints a line above the bars. The text is shown as it is."""
        self.console.print(escape(text), highlight=False)

    def state(self, done: int, left: int, seconds: Sequence[float], workers: int) -> None:
        """Shows how many trials are done, and the time left.

        Args:
            done: number of trials that are over.
            left: number of trials that wait or run.
            seconds: durations of the finished trials.
            workers: number of trials that run at the same time.
        """
        end = None
        if left and seconds:
            rest = statistics.fmean(seconds) * left / max(1, workers)
            end = time.monotonic() + rest
            if not self._told:
                self.line(f"{left} trial{'s' if left > 1 else ''} to go, about {duration(rest)} left")
                self._told = True
        self._bar.update(self._trials, completed=done, end=end)

    def run(self, label: str) -> None:
        """A run begins in this process."""
        self._bar.reset(self._run, total=None, description=escape(label), note="", visible=True)

    def step(self, step: int, total: int) -> None:
        """The run in this process has taken a step."""
        self._bar.update(self._run, completed=step, total=total)

    def loss(self, loss: float) -> None:
        """The run in this process was evaluated."""
        self._bar.update(self._run, note=f"validation loss {loss:.4f}")

    def idle(self, note: str) -> None:
        """No run in this process."""
        self._bar.update(self._run, visible=bool(note), description=escape(note), note="", total=None)


class _Note(ProgressColumn):
    """The time left, which falls while a trial runs, or a note."""

    def render(self, task: Task) -> Text:
        end = task.fields["end"]
        return Text(task.fields["note"] if end is None else f"about {duration(max(0.0, end - time.monotonic()))} left")
