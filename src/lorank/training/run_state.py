"""The state of a run: its parts and its progress. Every part of the training code receives this object."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from lorank.allocators import Allocator, Context, ResolvedBudget, State, TrainingInfo
from lorank.lora import AdapterLayers
from lorank.scoring import Share
from lorank.scoring.loss import LossFn
from lorank.training.learning_rate import adapter_group, rate_of, stated_peak

TrainBatches = Sequence[Mapping[str, Any]] | Callable[[], Sequence[Mapping[str, Any]]]
"""Batches of training data, or a function that returns them."""


@dataclass(eq=False)
class RunState:
    """The parts and the progress of a run.

    Args:
        layers: the LoRA layers.
        model: the model as the training loop calls it: ``layers.model``, or its wrapper by DDP, DeepSpeed or
            ``torch.compile``, or a larger model that contains it.
        optimizer: the torch optimiser whose steps are counted.
        allocator: the method.
        info: the length, seed and initial ranks of the run.
        validation_batch: the batch on which ranks are scored, or None.
        loss_fn: the user's own loss ``(model, batch) -> scalar``, or None for the model's loss.
        share: this process's share of scoring; None: all of it.
        train_batches: the first batches of training data, or a function that returns them; for a new run only.
        trained_model: ``model`` without the wrappers of DDP and DeepSpeed. Ranks are scored by its forward pass. None:
            ``layers.model``.

    Attributes:
        memory: the method's state, tensors by name (:data:`lorank.allocators.State`).
        budget: the budget that the ranks must fit at the end of the run, or None.
        step: the number of optimiser steps done.
        allocations: the number of allocations carried out.
        finished: whether the last decision has been carried out, so that the adapter is plain LoRA.
        learns_gates: whether the method learns gates, which every layer has until the run is finished.
        base: a fingerprint of the base model (:mod:`lorank.training.checkpoint.base_fingerprint`).
        first_lr: the adapter's learning rate when the run was attached.
        highest_lr: its highest learning rate in the steps so far.
    """

    layers: AdapterLayers
    model: nn.Module
    optimizer: torch.optim.Optimizer
    allocator: Allocator
    info: TrainingInfo
    validation_batch: Mapping[str, Any] | None = None
    loss_fn: LossFn | None = None
    share: Share | None = None
    train_batches: TrainBatches = ()
    trained_model: nn.Module = None  # type: ignore[assignment]  # set below
    memory: State = field(default_factory=dict)
    budget: ResolvedBudget | None = None
    step: int = 0
    allocations: int = 0
    finished: bool = False
    learns_gates: bool = False
    base: Mapping[str, Any] = field(default_factory=dict)
    first_lr: float = field(init=False)
    highest_lr: float = 0.0

    def __post_init__(self) -> None:
        self.first_lr = rate_of(adapter_group(self.optimizer, self.layers))
        if self.trained_model is None:
            self.trained_model = self.layers.model

    @property
    def seed(self) -> int:
        """A different seed for each step, so that a new rank does not repeat the values of a rank that was removed."""
        return self.info.seed * 1_000_003 + self.step

    def context(self) -> Context:
        """The present values of everything that the method may read."""
        group = adapter_group(self.optimizer, self.layers)
        lr = rate_of(group)
        return Context(
            self.step,
            self.info,
            self.trained_model,
            self.layers,
            self.validation_batch,
            self.loss_fn,
            lr=lr,
            peak_lr=max(stated_peak(group, self.first_lr), self.highest_lr, lr),
            share=self.share,
            train_batches=() if callable(self.train_batches) else self.train_batches,
        )

    def load_train_batches(self) -> None:
        """Takes the training batches, if the method begins with them. Call it when a new run begins."""
        if callable(self.train_batches):
            self.train_batches = list(self.train_batches()) if self.allocator.wants_train_batches else ()

    def record_learning_rate(self) -> None:
        """Notes the learning rate of the present step."""
        self.highest_lr = max(self.highest_lr, rate_of(adapter_group(self.optimizer, self.layers)))
