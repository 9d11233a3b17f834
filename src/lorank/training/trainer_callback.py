"""The callback for transformers' Trainer and TRL's trainers: a thin layer over :mod:`lorank.training.event_loop`."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Mapping, Sequence, Sized
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lorank.allocators import START_BATCHES, Allocator, TrainingInfo
from lorank.errors import LorankError, ResumeError, ValidationBatchError
from lorank.lora import (
    AdapterLayers,
    ResizeOnLoadHandle,
    find_layers,
    prevent_repacking,
    remove_stated_ranks_,
    resize_on_load,
    write_card,
)
from lorank.scoring.loss import LossFn
from lorank.training.attached_runs import attached_to, shares_optimizer
from lorank.training.checkpoint.integrity import seal
from lorank.training.checkpoint.rank_state import STATE_KEY
from lorank.training.checks import OTHER_METHODS, check_allocator
from lorank.training.event_loop import Ranks
from lorank.training.history import RankHistory
from lorank.training.log_lines import log_summary
from lorank.training.parallel.deepspeed import param_groups_of
from lorank.training.parallel.process_group import is_first_process
from lorank.training.progress import Report
from lorank.training.run_state import TrainBatches
from lorank.training.summary import Summary
from lorank.training.trainer_logs import TrainerLogs

logger = logging.getLogger("lorank")

Rows = Sequence[Mapping[str, Any]]
ValidationData = Mapping[str, Any] | Rows | Callable[[], Mapping[str, Any] | Rows]


class RankCallback(TrainerCallback):
    """Allocates ranks in a ``transformers.Trainer`` or a TRL trainer.

        trainer = Trainer(..., callbacks=[lorank.RankCallback(lorank.ALoRA(), validation_batch=eval_rows)])

    The Trainer's checkpoints are plain PEFT adapters. ``resume_from_checkpoint`` continues a run exactly.
    ``load_best_model_at_end`` restores the best weights together with their ranks. The Trainer's logs hold the ranks
    (``rank/<module>``, ``ranks/total``, …: :mod:`lorank.training.trainer_logs`), so that TensorBoard, W&B, trackio and
    MLflow show them; ``print(callback.summary())`` says what has come out.

    Before and after a run, one hook stays on the model: a resumed ``train()`` loads its checkpoint before it calls any
    callback, so the hook that resizes the layers must be there already. It changes nothing unless weights of other
    ranks are loaded. It is copied and pickled with the model, and acts on the copy then.

    Args:
        allocator: the method, with its settings.
        validation_batch: the data on which ranks are scored: a batch (mapping of tensors, including labels); or rows of
            a data set, from which the Trainer's own collator makes a batch; or a function that returns either and is
            called when training begins (``lambda: trainer.eval_dataset``). None: the first rows of the *training* set,
            with a warning in the log, if the method needs a batch.
        train_batches: the batches of training data for methods that begin with the gradient (BalancedLoRA), or a
            function that returns them. None: four batches of rows of the training set, drawn with ``seed``, as the
            Trainer's own collator makes them.
        samples: the number of rows to use if rows are given. ≥ 1. None: the number that the allocator prefers, 32 by
            default.
        loss_fn: your own loss, ``(model, batch) -> scalar tensor``; None: the model's loss.
        model: the model that holds the adapter, if the Trainer's model contains several: a module inside the Trainer's
            model. None: the Trainer's model, or the only adapted model inside it. Ranks are scored through the
            Trainer's model in any case.
        adapter: the name of the adapter; None: the active adapter.
        seed: the seed of all random numbers that lorank draws; None: the Trainer's seed.
        history_path: the file of the rank history; None: ``rank_history.jsonl`` in the Trainer's output folder.
        progress: whether scoring shows a progress bar; None: only on a terminal, unless the Trainer's progress bar is
            off; or a function that is called with (evaluations done, evaluations in total) instead.
        fused: see :func:`lorank.attach`.

    Attributes:
        ranks: the running :class:`~lorank.training.event_loop.Ranks`; None before training begins.

    Raises:
        ValidationBatchError: ``samples`` is less than 1.
        AllocatorError: ``allocator`` is not an allocator.
    """

    def __init__(
        self,
        allocator: Allocator,
        *,
        validation_batch: ValidationData | None = None,
        train_batches: TrainBatches | None = None,
        samples: int | None = None,
        loss_fn: LossFn | None = None,
        model: nn.Module | None = None,
        adapter: str | None = None,
        seed: int | None = None,
        history_path: str | Path | None = None,
        progress: bool | Report | None = None,
        fused: bool = True,
    ) -> None:
        check_allocator(allocator, "RankCallback")
        if samples is not None and samples < 1:
            raise ValidationBatchError(f"RankCallback(samples={samples}): expected at least 1")
        self.allocator = allocator
        self.ranks: Ranks | None = None
        self._validation_data = validation_batch
        self._train_batches = train_batches
        self._samples = allocator.validation_samples if samples is None else samples
        self._loss_fn = loss_fn
        self._adapted_model = model
        self._trained_model: nn.Module | None = None
        self._adapter = adapter
        self._seed = seed
        self._history_path = history_path
        self._progress = progress
        self._fused = fused
        self._layers: AdapterLayers | None = None
        self._initial_ranks: dict[str, int] = {}
        self._within_budget = False
        self._logs: TrainerLogs | None = None
        self._resize_handle: ResizeOnLoadHandle | None = None  # before and after training, without optimiser

    @property
    def by_module(self) -> dict[str, int]:
        """The present rank of each module.

        Raises:
            LorankError: training has not begun.
        """
        return self._begun("by_module").by_module

    def summary(self) -> Summary:
        """What has come out of the run so far (:meth:`lorank.Ranks.summary`).

        Raises:
            LorankError: training has not begun.
        """
        return self._begun("summary()").summary()

    def __repr__(self) -> str:
        return f"<RankCallback: {self.ranks or f'{type(self.allocator).__name__}, training has not begun'}>"

    def _repr_html_(self) -> str:
        return escape(repr(self)) if self.ranks is None else self.ranks._repr_html_()

    def _begun(self, what: str) -> Ranks:
        if self.ranks is None:
            raise LorankError(f"RankCallback.{what}: training has not begun. Call trainer.train() first")
        return self.ranks

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        # The Trainer has not loaded a checkpoint yet. From here on, loading a checkpoint resizes the layers.
        self._prepare_model(kwargs["model"])

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        layers = self._prepare_model(kwargs["model"])
        self._end_earlier_run(kwargs["optimizer"], resumes=bool(state.global_step))
        if state.global_step and STATE_KEY not in param_groups_of(kwargs["optimizer"])[0]:
            raise ResumeError(
                f"training resumes after step {state.global_step}, but the checkpoint's optimiser holds no rank state: "
                "the checkpoint was written without RankCallback (or with save_only_model). Start a new run, or resume "
                "from a checkpoint of a run with this callback"
            )
        loader, seed = kwargs["train_dataloader"], args.seed if self._seed is None else self._seed
        per_epoch = _length(loader)
        if per_epoch is not None:
            per_epoch = -(-per_epoch // args.gradient_accumulation_steps)
        history_path = self._history_path or Path(args.output_dir or ".") / "rank_history.jsonl"
        self.ranks = Ranks(
            layers,
            kwargs["optimizer"],
            self.allocator,
            TrainingInfo(state.max_steps, per_epoch, seed),
            # A method that does not need a batch may still use a batch that the user gives.
            validation_batch=self._validation_batch(loader)
            if self.allocator.needs_validation_batch or self._validation_data is not None
            else None,
            train_batches=partial(_draw_batches, loader, args.train_batch_size, seed)
            if self._train_batches is None
            else self._train_batches,
            loss_fn=self._loss_fn,
            history=RankHistory(history_path if is_first_process() else None),
            progress=False
            if not is_first_process() or (self._progress is None and args.disable_tqdm)
            else self._progress,
            initial_ranks=self._initial_ranks,
            fused=self._fused,
            model=self._trained_model,
            compiled=bool(args.torch_compile),
            replace=True,
            logs_summary=False,  # at the end of training, after the best checkpoint was loaded
        )
        if self._resize_handle is not None:
            self._resize_handle.remove()  # the hook of Ranks also resizes the optimiser's state
        limits = self.ranks.budget
        self._within_budget = limits is not None and limits.fits(self.ranks.layers.ranks)
        self._logs = TrainerLogs(self.ranks)
        self._logs.begin(args, state, control)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._logs is not None:
            self._logs.after_step(args, state, control)
        # load_best_model_at_end must not restore a checkpoint that exceeds the budget.
        if self.ranks is None or self.ranks.budget is None or self._within_budget:
            return
        self._within_budget = self.ranks.budget.fits(self.ranks.layers.ranks)
        if self._within_budget and state.best_metric is not None:
            logger.info(
                "step %d: the ranks fit the budget; earlier checkpoints no longer count as the best", self.ranks.step
            )
            state.best_metric = None
            state.best_model_checkpoint = None

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        checkpoint = Path(args.output_dir or ".") / f"checkpoint-{state.global_step}"
        if is_first_process() and checkpoint.is_dir():
            if self.ranks is not None and (checkpoint / "adapter_config.json").is_file():
                write_card(checkpoint, self.ranks.layers, self.ranks.about())
            seal(checkpoint)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.ranks is not None and self.ranks.attached:
            if args.load_best_model_at_end and state.best_model_checkpoint is not None:
                # FSDP loads the weights without the folder's configuration, which states the modules at rank 0.
                remove_stated_ranks_(self.ranks.layers, state.best_model_checkpoint, self.ranks.optimizer)
            self.ranks.finish()  # after an early stop, or after the best checkpoint was loaded
            self.ranks.detach()
            self._resize_handle = resize_on_load(self.ranks.layers)
            if self._logs is not None:
                self._logs.end(args, state)
            if self.allocator.moves_ranks and is_first_process():
                log_summary(self.ranks.summary())

    def _end_earlier_run(self, optimizer: Any, *, resumes: bool) -> None:
        """Detaches the run of an earlier ``train()`` that was interrupted. A run of another callback is refused.

        Raises:
            LorankError: another RankCallback of this Trainer, or a call of ``lorank.attach``, uses this optimiser.
        """
        layers = self._layers
        assert layers is not None
        if self.ranks is not None:
            was_finished = self.ranks.finished
            self.ranks.detach()
            if was_finished and not resumes:  # a second train() is a new run
                self._initial_ranks = layers.ranks
        others = [
            run for run in attached_to(layers, optimizer) if shares_optimizer(run, optimizer) and not run.finished
        ]
        if others:
            raise LorankError(
                f"the Trainer's optimiser has a run of rank allocation already, at step {others[0].step}, from another "
                "RankCallback or from lorank.attach, and two runs would both move ranks: keep one RankCallback "
                "(trainer.pop_callback(lorank.RankCallback) removes one), or end the other run with its ranks.detach()"
            )

    def _prepare_model(self, model: nn.Module) -> AdapterLayers:
        if self._layers is None or self._trained_model is not model:
            if self._resize_handle is not None:
                self._resize_handle.remove()
            self._trained_model = model
            self._layers = find_layers(model if self._adapted_model is None else self._adapted_model, self._adapter)
            prevent_repacking(model)  # never removed: the Trainer may evaluate before, between and after its runs
            self._initial_ranks = self._layers.ranks
            self._resize_handle = resize_on_load(self._layers)
        return self._layers

    def _validation_batch(self, loader: Any) -> Mapping[str, Any]:
        data = self._validation_data
        if callable(data):
            data = data()
        if data is None:
            data = loader.dataset
            count = min(self._samples, len(data)) if isinstance(data, Sized) else self._samples
            logger.warning(
                "%s scores ranks on the first %d rows of the training set, because RankCallback was given no "
                "validation_batch. Held-out data gives better scores: validation_batch=…",
                type(self.allocator).__name__,
                count,
            )
        if isinstance(data, Mapping) and all(isinstance(v, torch.Tensor | int | float) for v in data.values()):
            return data
        return _collate(data, range(self._samples), loader, "validation_batch")


def _draw_batches(loader: Any, size: int, seed: int) -> list[Mapping[str, Any]]:
    """A few batches of random rows of the training set, in evaluation's form. The global random state is restored."""
    data = loader.dataset
    if not isinstance(data, Sized) or not hasattr(data, "__getitem__"):
        raise ValidationBatchError(
            f"train_batches: the training set is a {type(data).__name__}, whose rows cannot be drawn. Give "
            f"{START_BATCHES} batches as the Trainer makes them: RankCallback(…, train_batches=[batch, …])"
        )
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed)).tolist()
    parts = [order[start : start + size] for start in range(0, min(len(order), START_BATCHES * size), size)]
    random_states = random.getstate(), np.random.get_state()  # noqa: NPY002  # collators draw from the global state
    try:
        with torch.random.fork_rng(devices=[]):
            return [_collate(data, part, loader, "train_batches") for part in parts]
    finally:
        random.setstate(random_states[0])
        np.random.set_state(random_states[1])  # noqa: NPY002  # as above


def _length(loader: Any) -> int | None:
    try:
        return len(loader)
    except TypeError:  # an iterable data set
        return None


def _collate(rows: Any, wanted: Sequence[int], loader: Any, what: str) -> Mapping[str, Any]:
    """Makes a batch of some rows, with the Trainer's own collator and the columns that the Trainer uses.

    Args:
        wanted: the numbers of the rows. Those beyond the last row are left out.
        what: the argument of RankCallback that the batch is for, for error messages.
    """
    try:
        count = len(rows)
        chosen = [rows[i] for i in wanted if i < count]
    except (TypeError, KeyError, NotImplementedError) as error:
        raise ValidationBatchError(
            f"{what}: expected a batch of tensors or rows that can be indexed, got {type(rows).__name__}. For a "
            f"streamed data set, collect the rows first: {what}=list(dataset.take(32))"
        ) from error
    if not chosen:
        raise ValidationBatchError(f"{what}: no rows were given, expected at least one to score ranks on (paper: 32)")
    kept = getattr(loader.dataset, "column_names", None)
    if kept and isinstance(chosen[0], Mapping):
        chosen = [{key: value for key, value in row.items() if key in kept} for row in chosen]
    try:
        batch = loader.collate_fn(chosen)
    except Exception as error:
        raise ValidationBatchError(
            f"{what}: the Trainer's collator cannot make a batch of the rows ({error}). Give rows in the form of the "
            f"training set's ({', '.join(kept or ['as the training data set returns them'])}), e.g. "
            f"validation_batch=lambda: trainer.eval_dataset, or ready batches of tensors, or {OTHER_METHODS}"
        ) from error
    if not isinstance(batch, Mapping):  # trainers of reinforcement learning hand out the rows as they are
        raise ValidationBatchError(
            f"the Trainer's collator makes a {type(batch).__name__} of the rows, not a batch with which model(**batch) "
            f"gives a loss: give {what}=… such batches of tensors (input_ids, labels, …), "
            f"or {OTHER_METHODS}"
        )
    return dict(batch)
