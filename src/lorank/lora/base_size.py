"""Counts the parameters of the base model: without adapters, and for packed weights as before quantisation."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from lorank.lora.shared_memory import memory_range


def base_parameters(model: nn.Module) -> int:
    """Number of parameters of the base model inside ``model``.

    Adapters and trained copies of modules are not counted. Tied parameters are counted once. Layers with packed weights
    (4-bit bitsandbytes, GPTQ, HQQ) count d_in · d_out, as before quantisation.
    """
    seen: set[Hashable] = set()
    return sum(_parameters(module, seen) for module in _base_modules(model))


def _base_modules(module: nn.Module) -> Iterator[nn.Module]:
    """The module and its submodules, without PEFT's wrappers and adapter weights."""
    if isinstance(module, BaseTunerLayer):
        yield from _base_modules(module.base_layer)
    elif isinstance(module, AuxiliaryTrainingWrapper):
        yield from _base_modules(module.original_module)
    else:
        yield module
        if not _is_packed(module):
            for child in module.children():
                yield from _base_modules(child)


def _parameters(module: nn.Module, seen: set[Hashable]) -> int:
    """Number of parameters of the module itself, without its children."""
    total = 0
    packed = _is_packed(module)
    if packed and id(module) not in seen:
        seen.add(id(module))
        sizes: Any = module
        bias = getattr(module, "bias", None)
        total += int(sizes.in_features) * int(sizes.out_features) + (0 if bias is None else bias.numel())
    for parameter in () if packed else module.parameters(recurse=False):
        # Tied weights may be one Parameter, or several around the same memory.
        key = memory_range(parameter) or id(parameter)
        if key not in seen:
            seen.add(key)
            total += parameter.numel()
    return total


def _is_packed(module: nn.Module) -> bool:
    """Whether a linear layer stores its weight in a packed form, whose number of elements is not d_in · d_out."""
    if not (hasattr(module, "in_features") and hasattr(module, "out_features")) or any(module.children()):
        return False
    weight = getattr(module, "weight", None)
    return weight is None or weight.numel() != int(module.in_features) * int(module.out_features)  # type: ignore[arg-type]  # whole numbers on every linear layer
