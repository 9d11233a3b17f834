"""Progress of a training run: a bar on a terminal, and one line per evaluation on any console."""

from __future__ import annotations

from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class TrainingProgress(TrainerCallback):
    """Shows the progress of a Trainer. Use it as a context around `trainer.train()`: the bar also ends after an error.

    Args:
        console: the console to write to; the bar appears only if the console is a terminal.
    """

    def __init__(self, console: Console) -> None:
        self._bar = Progress(
            SpinnerColumn(),
            TextColumn("Training"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[loss]}"),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._console = console
        self._task = self._bar.add_task("Training", total=None, loss="")

    def __enter__(self) -> TrainingProgress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def scoring(self, done: int, total: int) -> None:
        """Shows the progress of scoring, which can take minutes, in the place of the loss."""
        self._bar.update(self._task, loss=f"scoring ranks: {done} of {total} evaluations")

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._bar.update(self._task, total=state.max_steps, completed=state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._bar.update(self._task, completed=state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        logs = logs or {}
        if "loss" in logs:
            self._bar.update(self._task, loss=f"loss {float(logs['loss']):.3f}")
        if "eval_loss" in logs:
            self._console.print(
                f"step {state.global_step}/{state.max_steps}: validation loss {float(logs['eval_loss']):.4f}",
                highlight=False,
            )
