"""The base class of backends for distributed training.

A backend is an integration that knows where several processes keep the adapter's weights, gradients and moments. A new
backend is one file with a subclass of :class:`Backend`, and an entry in :data:`lorank.training.parallel.BACKENDS`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from lorank.lora import AdapterLayers, unwrap_optimizer
from lorank.training.integrations.base import Integration
from lorank.training.run_state import RunState


class Backend(Integration):
    """The backend for one process, or for several processes that each hold the complete adapter and optimiser state.

    Args:
        layers: the LoRA layers.
        model: the model as the training loop calls it.
        optimizer: the user's optimiser.

    Attributes:
        optimizer: the torch optimiser whose steps are counted.
        lockstep: whether a forward pass needs all processes at once, so that no process can evaluate alone.
    """

    lockstep = False

    def __init__(self, layers: AdapterLayers, model: nn.Module, optimizer: Any) -> None:
        self.optimizer: torch.optim.Optimizer = unwrap_optimizer(optimizer)

    @classmethod
    def supports(cls, layers: AdapterLayers, model: nn.Module, optimizer: Any) -> bool:
        """Whether this backend is the one for such a model and optimiser."""
        return True

    @classmethod
    def inner(cls, model: nn.Module) -> nn.Module:
        """The model inside this backend's wrapper, or ``model`` itself if it has no such wrapper."""
        return model

    def after_restore(self, run: RunState) -> None:
        """Called if a run could not begin, when the layers have their weights and shapes of before again."""

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """A context in which the model in this process has the complete adapter."""
        yield
