"""A context manager that restores the model after scoring, also after an exception."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from lorank.lora.layer import AdapterLayers
from lorank.lora.quantised import RepackingPrevention

_ABSENT = object()


@contextmanager
def preserve_state(model: nn.Module, layers: AdapterLayers) -> Iterator[None]:
    """Sets evaluation mode without gradients, and restores the model afterwards.

    Inside, modules are in evaluation mode, gradients are off, and compiled modules run uncompiled, because a gate that
    changes in every forward pass would make each of them compile again. Restored afterwards: each module's training
    mode, every layer's gate, instance-level ``forward`` methods, the random generators of PyTorch (of the CPU and of
    each GPU in use), NumPy and Python, and the module attributes that this function changed. Parameters, their
    gradients and ``requires_grad`` are not changed.

    The cache of autocast is emptied. If it was filled without gradients, it holds weights without gradients. A training
    step in the same autocast region would use these weights, and its parameters would not learn.
    """
    modules = list(model.modules())
    training = [module.training for module in modules]
    forwards = [module.__dict__.get("forward", _ABSENT) for module in modules]
    compiled = [module for module in modules if getattr(module, "_compiled_call_impl", None) is not None]
    calls = [module._compiled_call_impl for module in compiled]
    repacking_prevention = RepackingPrevention(model)
    gates: list[Tensor | None] = [layer.gate for layer in layers.values()]
    in_use = torch.cuda.is_available() and torch.cuda.is_initialized()  # type: ignore[no-untyped-call]  # torch
    gpus = list(range(torch.cuda.device_count())) if in_use else []
    random_states = random.getstate(), np.random.get_state()  # noqa: NPY002  # a loss function may draw from the global state
    try:
        with torch.random.fork_rng(devices=gpus), torch.no_grad():
            # The attribute is set directly: the train() method of some modules does more than set it.
            for module in modules:
                module.training = False
            for module in compiled:
                module._compiled_call_impl = None
            yield
    finally:
        for module, mode, forward in zip(modules, training, forwards, strict=True):
            module.training = mode
            if forward is not _ABSENT:
                module.__dict__["forward"] = forward
            else:
                module.__dict__.pop("forward", None)
        for module, call in zip(compiled, calls, strict=True):
            module._compiled_call_impl = call
        random.setstate(random_states[0])
        np.random.set_state(random_states[1])  # noqa: NPY002  # as above
        repacking_prevention.remove()
        for layer, gate in zip(layers.values(), gates, strict=True):
            layer.gate = gate
        torch.clear_autocast_cache()
