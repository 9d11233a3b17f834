"""A few values of the base model's weights, by which another base model of the same shapes is known."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TypeAlias

import torch
from torch import Tensor

from lorank.errors import ResumeError
from lorank.lora import AdapterLayers

MODULES, VALUES = 8, 16
"""How many modules are looked at, and how many values of each, both evenly spread."""
TOLERANCE = 2**-7
"""Relative: a base that is loaded again in another float type is rounded, and is still the same."""
BaseFingerprint: TypeAlias = "dict[str, list[float] | list[int]]"


def base_fingerprint(layers: AdapterLayers) -> BaseFingerprint:
    """Per module the values, numbers as they are stored (of quantised weights the integers).

    Modules whose weight cannot be seen whole in this process, or is trained, are left out: those that are sharded,
    elsewhere, or kept by a library in a form of its own.
    """
    names = list(layers)
    chosen = [names[i] for i in _spread(len(names), MODULES)]
    return {name: values for name in chosen if (values := _values(layers, name))}


def check_same_base(saved: Mapping[str, list[float] | list[int]], layers: AdapterLayers) -> None:
    """Whether the base model is the one that the values are of.

    Values are compared where both can be seen and are of one kind: a base that is quantised now and was not then, or
    is sharded now, is taken on trust.

    Raises:
        ResumeError: it is another one.
    """
    for name, now in base_fingerprint(layers).items():
        then = saved.get(name, now)
        if {type(value) for value in then} != {type(value) for value in now} or len(then) != len(now):
            continue
        if all(_same(a, b) for a, b in zip(then, now, strict=True)):
            continue
        raise ResumeError(
            f"the checkpoint is of another base model: the frozen weight of {name} has other values than the run was "
            "started with. Load the same weights, and prepare them in the same way (initialisations such as PiSSA "
            "change them too)"
        )


def _same(a: float, b: float) -> bool:
    return a == b if isinstance(a, int) else math.isclose(a, b, rel_tol=TOLERANCE, abs_tol=1e-12)


def _values(layers: AdapterLayers, name: str) -> list[float] | list[int]:
    weight = getattr(layers[name].module.get_base_layer(), "weight", None)
    if not isinstance(weight, Tensor) or weight.requires_grad or type(weight.data) is not Tensor:
        return []
    if weight.device.type == "meta" or not weight.numel() or hasattr(weight, "ds_id"):
        return []
    flat = weight.detach().reshape(-1)
    taken = flat[torch.tensor(_spread(len(flat), VALUES), device=flat.device)].cpu()
    return taken.double().tolist() if taken.is_floating_point() else taken.long().tolist()


def _spread(count: int, most: int) -> list[int]:
    """At most so many indices below ``count``, the first and the last among them."""
    taken = min(count, most)
    return [i * (count - 1) // max(1, taken - 1) for i in range(taken)]
