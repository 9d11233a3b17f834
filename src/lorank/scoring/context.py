"""The inputs of allocators and scorers: the training run, the current step, and their own state."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lorank.lora.layer import AdapterLayers
from lorank.scoring.work_sharding import Share

State = dict[str, Tensor]
"""A method's own state: named tensors, saved and loaded unchanged. Empty for a method that keeps nothing."""


@dataclass(frozen=True)
class TrainingInfo:
    """The training run in which ranks are allocated.

    Args:
        total_steps: optimiser steps of the whole run.
        steps_per_epoch: optimiser steps of one pass over the training data, or None if unknown.
        seed: seed of the run.
        initial_ranks: per module, the rank that the adapter was made with. A resumed run has the same initial ranks.
    """

    total_steps: int
    steps_per_epoch: float | None = None
    seed: int = 0
    initial_ranks: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Context:
    """What an allocator or a scorer may read when it decides.

    Args:
        step: optimiser steps done so far (1 after the first).
        run: the whole run.
        model: the model, for methods that evaluate it.
        layers: its LoRA layers.
        validation_batch: the batch that ranks are scored on, or None.
        loss_fn: the user's own loss ``(model, batch) -> scalar``, or None for the model's.
        progress: called with (evaluations done, evaluations in all) while ranks are scored, or None.
        lr: the learning rate of the adapter's parameter group in this step.
        peak_lr: its peak: what the schedule states, or the highest rate so far if that is higher
            (:mod:`lorank.training.learning_rate`). ≥ lr.
        train_batches: the first batches of training data, for a method that begins from their gradient; empty if none
            were given.
        share: this process's share of scoring, if several processes train the model; None: there is one process.
    """

    step: int
    run: TrainingInfo
    model: nn.Module
    layers: AdapterLayers
    validation_batch: Mapping[str, Any] | None = None
    loss_fn: Callable[[nn.Module, Mapping[str, Any]], Tensor] | None = None
    progress: Callable[[int, int], None] | None = None
    lr: float = 0.0
    peak_lr: float = 0.0
    share: Share | None = None
    train_batches: Sequence[Mapping[str, Any]] = ()

    @property
    def lr_factor(self) -> float:
        """The learning rate divided by its peak: 1 at the peak. 1 if no learning rate is known."""
        return self.lr / self.peak_lr if self.peak_lr > 0 else 1.0

    def mean(self, values: Tensor) -> Tensor:
        """The mean of ``values``, (n,), over all processes, bitwise equal in all of them; ``values`` if there is one.

        Gradients of parameters and gates are averaged before a method receives them. A value that a method computes
        itself may differ in its last bits between GPUs. It must be averaged by this function before a decision uses it.
        """
        if self.share is None:
            return values
        rows = self.share.gather(values.detach().to("cpu", torch.float64))  # (processes, n)
        return rows.mean(0).to(values)
