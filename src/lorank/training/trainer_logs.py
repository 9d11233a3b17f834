"""The ranks in the Trainer's own logs, so that TensorBoard, W&B, trackio, MLflow and ``log_history`` show them.

    rank/<module>             the rank of each module
    ranks/total               all ranks
    ranks/parameters          numbers in A and B
    ranks/budget_used         the part of the budget that they use, 0 to 1; the largest if there are several limits
    ranks/moved               ranks pruned and added so far
    ranks/scoring_seconds     seconds that allocations have taken so far, scoring included

They are written when training begins, after each allocation and when training ends, and not at every step.

transformers gives a callback no way into the logs: ``on_log`` comes after the reporting callbacks have had their copy,
and neither the Trainer nor its handler of callbacks is among the arguments. But the handler is what calls the callback,
so it is one frame above it. If it is not there (a trainer of another make), ``log_history`` still holds the values.
"""

from __future__ import annotations

import inspect
import weakref
from typing import Any

from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler, PrinterCallback, ProgressCallback

from lorank.training.event_loop import Ranks
from lorank.training.history import Record
from lorank.training.summary import moved, share

TERMINAL = ("RichProgressCallback",)
"""Callbacks of TRL that print every value of a log, by name, because TRL may be absent."""


class TrainerLogs:
    """Writes a run's ranks to the logs of a Trainer.

    Args:
        ranks: the run.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._handler: weakref.ref[CallbackHandler] | None = None
        self._written: Record | None = None
        self._last_step = -1

    def begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl) -> None:
        """Writes the ranks at the start, unless the run is resumed: then the logs hold them. Call it in a callback."""
        handler = _calling_handler()
        self._handler = None if handler is None else weakref.ref(handler)
        self._written = self._ranks.history[-1]
        if not state.global_step:
            self._write(args, state, control)

    def after_step(self, args: TrainingArguments, state: TrainerState, control: TrainerControl) -> None:
        """Writes the ranks if an allocation was carried out, and after the last step."""
        last = state.global_step >= state.max_steps or control.should_training_stop
        if self._ranks.history[-1] is not self._written or last:
            self._write(args, state, control)

    def end(self, args: TrainingArguments, state: TrainerState) -> None:
        """Writes the ranks to ``log_history`` if they have changed since: by the best checkpoint or an early end.

        Not to the reporting callbacks, which have closed their runs.
        """
        values = self._values()
        written = next((entry for entry in reversed(state.log_history) if "ranks/total" in entry), {})
        if any(written.get(key) != value for key, value in values.items()):
            place = -1 if state.log_history and "train_runtime" in state.log_history[-1] else len(state.log_history)
            state.log_history.insert(place, self._entry(state, values))

    def _write(self, args: TrainingArguments, state: TrainerState, control: TrainerControl) -> None:
        self._written = self._ranks.history[-1]
        values = self._values()
        state.log_history.append(self._entry(state, values))
        handler = self._handler() if self._handler is not None else None
        if handler is None:
            return
        for callback in list(handler.callbacks):
            # Those print the whole dictionary, of hundreds of modules; the log has a line about the allocation.
            if isinstance(callback, ProgressCallback | PrinterCallback) or type(callback).__name__ in TERMINAL:
                continue
            callback.on_log(
                args,
                state,
                control,
                logs={**values, **({} if state.epoch is None else {"epoch": state.epoch})},
                model=handler.model,
                processing_class=handler.processing_class,
                optimizer=handler.optimizer,
                lr_scheduler=handler.lr_scheduler,
                train_dataloader=handler.train_dataloader,
                eval_dataloader=handler.eval_dataloader,
            )

    def _entry(self, state: TrainerState, values: dict[str, float]) -> dict[str, Any]:
        return {**values, **({} if state.epoch is None else {"epoch": state.epoch}), "step": state.global_step}

    def _values(self) -> dict[str, float]:
        run, records = self._ranks, self._ranks.history.allocations
        budget = run.budget
        used = {} if budget is None else budget.used(run.layers.ranks)
        return {
            "ranks/total": run.layers.total_rank,
            "ranks/parameters": run.layers.parameters,
            **({"ranks/budget_used": max(map(share, used.values()))} if used else {}),
            "ranks/moved": sum(map(moved, records)),
            "ranks/scoring_seconds": sum(record.seconds for record in records),
            **{f"rank/{name}": rank for name, rank in run.layers.ranks.items()},
        }


def _calling_handler() -> CallbackHandler | None:
    """The handler of callbacks that is calling a callback now, or None."""
    frame = inspect.currentframe()
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, CallbackHandler):
            return owner
        frame = frame.f_back
    return None
