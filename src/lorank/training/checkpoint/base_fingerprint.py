"""A fingerprint of the base model: a few values of its weights, which tell it from other models of the same shapes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TypeAlias

import torch
from torch import Tensor

from lorank.errors import ResumeError
from lorank.lora import AdapterLayers

MAX_MODULES, MAX_VALUES = 8, 16
"""Maximum number of modules, and of values per module, both evenly spaced."""
TOLERANCE = 2**-7
"""Relative tolerance. A base model that is loaded again in another float type is rounded, and still the same model."""
BaseFingerprint: TypeAlias = "dict[str, list[float] | list[int]]"


def base_fingerprint(layers: AdapterLayers) -> BaseFingerprint:
    """Per module, at most 16 values of its frozen weight, as they are stored (integers for quantised weights).

    A module is left out if its weight is trained, or is not complete in this process: sharded, on the meta device, or
    in a tensor class of another library.
    """
    names = list(layers)
    chosen = [names[i] for i in _evenly_spaced(len(names), MAX_MODULES)]
    return {name: values for name in chosen if (values := _values(layers, name))}


def check_same_base(saved: Mapping[str, list[float] | list[int]], layers: AdapterLayers) -> None:
    """Checks that the base model is the same as when the run was saved.

    Values are compared only if both are available and of the same type. So a base model that is sharded now, or
    quantised now and was not before, is not checked.

    Args:
        saved: the result of :func:`base_fingerprint` when the run was saved.
        layers: the LoRA layers.

    Raises:
        ResumeError: the base model is another one.
    """
    for name, new in base_fingerprint(layers).items():
        old = saved.get(name, new)
        if {type(value) for value in old} != {type(value) for value in new} or len(old) != len(new):
            continue
        if all(_is_equal(a, b) for a, b in zip(old, new, strict=True)):
            continue
        raise ResumeError(
            f"the checkpoint is of another base model: the frozen weight of {name} has other values than when the run "
            "was started. Load the same weights, and prepare them in the same way (initialisations such as PiSSA "
            "change them too)"
        )


def _is_equal(a: float, b: float) -> bool:
    return a == b if isinstance(a, int) else math.isclose(a, b, rel_tol=TOLERANCE, abs_tol=1e-12)


def _values(layers: AdapterLayers, name: str) -> list[float] | list[int]:
    layer = layers[name]
    weight = layer.module.get_param() if layer.is_expert else getattr(layer.module.get_base_layer(), "weight", None)
    if not isinstance(weight, Tensor) or weight.requires_grad or type(weight.data) is not Tensor:
        return []
    if weight.device.type == "meta" or not weight.numel() or hasattr(weight, "ds_id"):
        return []
    flat = weight.detach().reshape(-1)
    sample = flat[torch.tensor(_evenly_spaced(len(flat), MAX_VALUES), device=flat.device)].cpu()
    return sample.double().tolist() if sample.is_floating_point() else sample.long().tolist()


def _evenly_spaced(count: int, limit: int) -> list[int]:
    """At most ``limit`` evenly spaced indices below ``count``, including the first and the last."""
    size = min(count, limit)
    return [i * (count - 1) // max(1, size - 1) for i in range(size)]
