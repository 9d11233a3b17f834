"""What methods and their scorers know of the run that they serve, and the form of what they remember."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lorank.lora.layer import AdapterLayers
from lorank.scoring.work_sharding import Share

State = dict[str, Tensor]
"""A method's own memory: named tensors, saved and loaded as they are. Empty for a method without memory."""


@dataclass(frozen=True)
class TrainingInfo:
    """The run that ranks are allocated in.

    Args:
        total_steps: optimiser steps of the whole run.
        steps_per_epoch: optimiser steps of one pass over the training data, or None where nobody knows.
        seed: seed of the run.
        initial_ranks: per module, the rank that the adapter was made with; a run that is resumed has the same.
    """

    total_steps: int
    steps_per_epoch: float | None = None
    seed: int = 0
    initial_ranks: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Context:
    """What an allocator or a scorer may look at when it decides.

    Args:
        step: optimiser steps done so far (1 after the first).
        run: the whole run.
        model: the model, for methods that evaluate it.
        layers: its LoRA layers.
        validation_batch: the batch that ranks are scored on, or None.
        loss_fn: the user's own loss ``(model, batch) -> scalar``, or None for the model's.
        progress: called with (evaluations done, evaluations in all) during long scoring, or None.
        lr: the optimiser's learning rate in this step.
        peak_lr: the learning rate that its schedule is a multiple of.
        share: this process's share of scoring, where several train the model together; None: it trains alone.
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

    @property
    def lr_factor(self) -> float:
        """Where the learning-rate schedule is: 1 at its peak. 1 where there is no learning rate."""
        return self.lr / self.peak_lr if self.peak_lr > 0 else 1.0

    def mean(self, values: Tensor) -> Tensor:
        """The mean of what each process found, (n,), alike in all of them to the last bit; alone, ``values``.

        Gradients of parameters and gates are averaged before a method sees them. What it evaluates by itself may differ
        in its last bits between GPUs, and is averaged by this before anything rests on it.
        """
        if self.share is None:
            return values
        rows = self.share.gather(values.detach().to("cpu", torch.float64))  # (processes, n)
        return rows.mean(0).to(values)
