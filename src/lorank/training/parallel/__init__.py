"""Several processes that train one model: which backends there are, and which of them a run has."""

from __future__ import annotations

from typing import Any

from torch import nn

from lorank.lora import AdapterLayers
from lorank.training.parallel.backend import Backend
from lorank.training.parallel.ddp import DdpBackend
from lorank.training.parallel.deepspeed import ZeroBackend
from lorank.training.parallel.fsdp import FsdpBackend

BACKENDS: tuple[type[Backend], ...] = (ZeroBackend, FsdpBackend, DdpBackend, Backend)
"""In the order in which they are asked; the last one serves whatever the others do not."""


def find_backend(layers: AdapterLayers, model: nn.Module, optimizer: Any) -> Backend:
    """The backend for a model and an optimiser, as the training loop has them.

    Raises:
        LorankError, OptimizerStateError: the backend cannot serve them.
    """
    return next(backend for backend in BACKENDS if backend.serves(layers, model, optimizer))(layers, model, optimizer)


def inner_model(model: nn.Module) -> nn.Module:
    """The model inside what DDP or DeepSpeed made of it, or the model itself."""
    for backend in BACKENDS:
        model = backend.inner(model)
    return model
