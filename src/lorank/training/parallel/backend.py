"""What a backend for distributed training is.

A backend is an integration that knows where the adapter's weights, gradients and moments are while several processes
train them. A new one is a file with a subclass of :class:`Backend`, and its name in
:data:`lorank.training.parallel.BACKENDS`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from lorank.lora import AdapterLayers, unwrap_optimizer
from lorank.training.integrations.base import Integration


class Backend(Integration):
    """One process, or several in each of which weights, gradients and optimiser state of the adapter are whole.

    Args:
        layers: the LoRA layers.
        model: the model as the training loop calls it.
        optimizer: what the user made.

    Attributes:
        optimizer: the torch optimiser whose steps count.
        lockstep: whether a forward pass needs all processes at once, so that none can evaluate by itself.
    """

    lockstep = False

    def __init__(self, layers: AdapterLayers, model: nn.Module, optimizer: Any) -> None:
        self.optimizer: torch.optim.Optimizer = unwrap_optimizer(optimizer)

    @classmethod
    def serves(cls, layers: AdapterLayers, model: nn.Module, optimizer: Any) -> bool:
        """Whether this is the backend that such a model and optimiser were made for."""
        return True

    @classmethod
    def inner(cls, model: nn.Module) -> nn.Module:
        """The model inside what this backend makes of it; another model, as it is."""
        return model

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Inside, this process has the whole adapter in its model."""
        yield
