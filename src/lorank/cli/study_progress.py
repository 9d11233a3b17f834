"""The progress of a study: a bar with the time left on a terminal, a line per finished run elsewhere."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING

from lorank.experiments.time_left import duration

if TYPE_CHECKING:
    from rich.console import Console

    from lorank.experiments.study.trials import Progress


class StudyProgress:
    """A context; call it with each progress of a study.

    Args:
        console: where to write; the bar appears only if it is a terminal.
    """

    def __init__(self, console: Console) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as Bar

        self._console = console
        self._bar = Bar(
            TextColumn("Runs"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
            TextColumn("[dim]{task.description}[/]"),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("", total=None, left="")
        self._first: int | None = None
        self._told_time = False

    def __enter__(self) -> StudyProgress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def __call__(self, progress: Progress) -> None:
        from rich.markup import escape

        left = "" if progress.seconds_left is None else f"about {duration(progress.seconds_left)} left"
        self._bar.update(
            self._task,
            completed=progress.done,
            total=progress.total,
            left=left,
            description=escape(progress.last),
        )
        missing = progress.total - progress.done
        if self._first is None:
            self._first = progress.done
            finished = f"; {progress.done} are finished" if progress.done else ""
            more = f", {left}" if left else "; the first ones will tell how long that takes" if missing else ""
            self._console.print(f"{progress.total} runs{finished}{more}", highlight=False)
        elif not self._console.is_terminal:
            self._console.print(
                f"{progress.done} of {progress.total}: {escape(progress.last)}{'; ' + left if left else ''}",
                highlight=False,
                soft_wrap=True,
            )
        elif not self._told_time and left:
            self._told_time = True
            self._console.print(f"{left} for {missing} runs", highlight=False)
