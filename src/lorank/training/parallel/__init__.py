"""Training one model with several processes: the backends, and the choice of the backend for a run."""

from __future__ import annotations

from typing import Any

from torch import nn

from lorank.lora import AdapterLayers
from lorank.training.parallel.backend import Backend
from lorank.training.parallel.ddp import DdpBackend
from lorank.training.parallel.deepspeed import ZeroBackend
from lorank.training.parallel.fsdp import FsdpBackend

BACKENDS: tuple[type[Backend], ...] = (ZeroBackend, FsdpBackend, DdpBackend, Backend)
"""The first backend that supports the run is used. The last one supports every run."""


def find_backend(layers: AdapterLayers, model: nn.Module, optimizer: Any) -> Backend:
    """Chooses and makes the backend for a model and an optimiser.

    Args:
        layers: the LoRA layers.
        model: the model as the training loop calls it.
        optimizer: the optimiser of the training loop.

    Raises:
        LorankError, OptimizerStateError: the backend does not support this model or optimiser.
    """
    return next(backend for backend in BACKENDS if backend.supports(layers, model, optimizer))(layers, model, optimizer)


def inner_model(model: nn.Module) -> nn.Module:
    """The model inside the wrapper of DDP or DeepSpeed, or the model itself."""
    for backend in BACKENDS:
        model = backend.inner(model)
    return model
