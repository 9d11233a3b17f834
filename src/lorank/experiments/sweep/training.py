"""One run of a trial by the Trainer, watched: signs of life, intermediate losses, an early stop."""

from __future__ import annotations

from typing import Any, Protocol

from rich.console import Console
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lorank.config.settings import RunConfig
from lorank.experiments.run import RunResult, train


class Watch(Protocol):
    """What accompanies a run. Each method may raise, which ends the run."""

    def step(self, step: int, total: int) -> None:
        """An optimiser step is done."""

    def evaluation(self, step: int, total: int, loss: float) -> None:
        """The validation loss after a step."""


class WatchCallback(TrainerCallback):
    """Tells a watch what the Trainer does."""

    def __init__(self, watch: Watch) -> None:
        self._watch = watch

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._watch.step(state.global_step, state.max_steps)

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if metrics and "eval_loss" in metrics:
            self._watch.evaluation(state.global_step, state.max_steps, float(metrics["eval_loss"]))


def train_watched(config: RunConfig, *, resume: bool, console: Console, watch: Watch) -> RunResult:
    """Runs a configuration (see :func:`lorank.experiments.train`)."""
    return train(config, resume=resume, console=console, callbacks=[WatchCallback(watch)])
