"""Attaches rank allocation to any training loop that calls ``optimizer.step()`` (:mod:`lorank.training.event_loop`)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lorank.allocators import Allocator, TrainingInfo
from lorank.lora import find_layers
from lorank.scoring.loss import LossFn
from lorank.training.checks import check_allocator
from lorank.training.event_loop import Ranks
from lorank.training.history import RankHistory
from lorank.training.parallel import inner_model
from lorank.training.parallel.process_group import is_first_process
from lorank.training.progress import Report
from lorank.training.run_state import TrainBatches


def attach(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | Any,
    allocator: Allocator,
    *,
    total_steps: int,
    steps_per_epoch: float | None = None,
    validation_batch: Mapping[str, Any] | None = None,
    train_batches: TrainBatches = (),
    loss_fn: LossFn | None = None,
    adapter: str | None = None,
    seed: int = 0,
    history_path: str | Path | None = None,
    progress: bool | Report | None = None,
    fused: bool = True,
    grad_scaler: Any = None,
    replace: bool = False,
) -> Ranks:
    """Lets ``allocator`` change the ranks of ``model``'s LoRA layers during training, in the steps of ``optimizer``.

        ranks = lorank.attach(model, optimizer, lorank.ALoRA(), validation_batch=batch, total_steps=1000)
        for batch in data:
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    To resume, call it on the model as the run began, before ``model.load_state_dict``: from then on, loading weights of
    other ranks resizes the layers. The optimiser may be loaded before or after.

    Args:
        model: the model that the loop trains: a ``PeftModel`` with a LoRA adapter, a transformers model with one, a
            larger model that contains one of them, or ``DistributedDataParallel`` of any. Ranks are scored by its
            forward pass. If several processes train together, each of them calls this function with the same
            arguments.
        optimizer: any ``torch.optim.Optimizer`` made from the model's parameters, also inside accelerate's wrapper.
        allocator: the method, with its settings.
        total_steps: the number of optimiser steps of the whole run. ≥ 1.
        steps_per_epoch: the number of optimiser steps per epoch, for settings that count epochs; None: unknown (the
            documentation of each method says what it assumes then).
        validation_batch: the batch on which ranks are scored: the model's arguments, including labels. It should not be
            training data; the ALoRA paper uses 32 samples.
        train_batches: a few batches of training data as the loop makes them, or a function that returns them, for
            methods that begin with the gradient (BalancedLoRA): 4 suffice. They are used once, when a new run begins.
        loss_fn: your own loss, ``(model, batch) -> scalar tensor``; None: the model's loss.
        adapter: the name of the adapter; None: the active adapter.
        seed: the seed of all random numbers that lorank draws.
        history_path: a JSONL file for the rank history, written by process 0; None: in memory only
            (``ranks.history``).
        progress: whether scoring shows a progress bar; None: only on a terminal; or a function that is called with
            (evaluations done, evaluations in total) instead.
        fused: whether layers use lorank's fused forward until the run ends. It is faster and saves less for the
            backward pass (docs/performance.md). The values are the same up to rounding. With ``lora_dropout`` on a CPU,
            modules with the same input share one dropout draw. False: PEFT's forward.
        replace: whether a present run of this adapter, or of this optimiser, is detached first, as when a notebook
            cell runs again. It ends even if the new run cannot begin. False: the present run is kept, and the new one
            refused, unless the present run has finished.
        grad_scaler: the ``torch.amp.GradScaler`` of a float16 loop, which methods with learned gates need;
            accelerate's optimiser provides it. Steps that the scaler skips are not counted.

    Returns:
        The running object: ``ranks.history``, ``ranks.layers``, ``ranks.step``, ``ranks.detach()``. If the optimiser
        was loaded from a checkpoint of such a run, the run continues from there. If the last run of this adapter in
        this process stopped before its end, the new one has the initial ranks of that run, and so its budget.

    Raises:
        LorankError: the adapter or the optimiser has a run already; or one of the subclasses AllocatorError,
            AdapterError, OptimizerStateError, ScheduleError, BudgetError, ValidationBatchError, ResumeError,
            DisagreementError: see :mod:`lorank.errors`. Model, adapter, optimiser and history are then as they were
            before the call.
    """
    check_allocator(allocator, "attach")
    return Ranks(
        find_layers(inner_model(model), adapter),
        optimizer,
        allocator,
        TrainingInfo(total_steps=total_steps, steps_per_epoch=steps_per_epoch, seed=seed),
        validation_batch=validation_batch,
        loss_fn=loss_fn,
        history=RankHistory(history_path if is_first_process() else None),
        progress=progress if is_first_process() else False,
        model=model,
        fused=fused,
        grad_scaler=grad_scaler,
        replace=replace,
        train_batches=train_batches,
    )
