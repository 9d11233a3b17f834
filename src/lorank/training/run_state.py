"""What a run is made of, and how far it has come: the one object that every part of the training loop is handed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from lorank.allocators import Allocator, Context, ResolvedBudget, State, TrainingInfo
from lorank.lora import AdapterLayers
from lorank.scoring import Share
from lorank.scoring.loss import LossFn


@dataclass(eq=False)
class RunState:
    """A run.

    Args:
        layers: the LoRA layers.
        model: the model as the training loop calls it: ``layers.model``, or what DDP, DeepSpeed or ``torch.compile``
            made of it.
        optimizer: the torch optimiser whose steps count.
        allocator: the method.
        info: length, seed and initial ranks.
        validation_batch: what ranks are scored on, or None.
        loss_fn: the user's own loss ``(model, batch) -> scalar``, or None for the model's.
        share: this process's share of scoring; None: all of it.

    Attributes:
        memory: what the method remembers, by name (:data:`lorank.allocators.State`).
        budget: what the ranks must fit at the end, or None.
        step: optimiser steps done.
        allocations: allocations carried out.
        finished: whether the last decision has been carried out, so that the adapter is plain LoRA.
        base: values by which the base model is known again (:mod:`lorank.training.checkpoint.base_fingerprint`).
    """

    layers: AdapterLayers
    model: nn.Module
    optimizer: torch.optim.Optimizer
    allocator: Allocator
    info: TrainingInfo
    validation_batch: Mapping[str, Any] | None = None
    loss_fn: LossFn | None = None
    share: Share | None = None
    memory: State = field(default_factory=dict)
    budget: ResolvedBudget | None = None
    step: int = 0
    allocations: int = 0
    finished: bool = False
    base: Mapping[str, Any] = field(default_factory=dict)

    @property
    def seed(self) -> int:
        """Another one for each allocation, so that a rank that returns is not the one that went."""
        return self.info.seed * 1_000_003 + self.step

    def context(self) -> Context:
        """What the method may look at, as it is now."""
        group = self.optimizer.param_groups[0]
        lr = float(group.get("lr") or 0.0)
        return Context(
            self.step,
            self.info,
            self.layers.model,
            self.layers,
            self.validation_batch,
            self.loss_fn,
            lr=lr,
            # what the schedule multiplies: its peak
            peak_lr=float(group.get("initial_lr") or self.optimizer.defaults.get("lr") or lr),
            share=self.share,
        )
