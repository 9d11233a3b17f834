"""LoRA of a parameter (``target_parameters``): the weights of a stack of experts, or a single matrix.

    W_e' = W_e + s · B_e diag(g) A_e        for every expert e        W: (E, …), one rank and one gate for all experts

PEFT wraps the module that holds the parameter in a ``ParamWrapper``, which adds the update to the parameter in every
forward pass. Several parameters of one module have nested wrappers; PEFT's patterns know each by the name of its
parameter. A ``ParamWrapper`` calls no ``LoraVariant``, and cannot compute with rank 0. So while a layer has a gate or
rank 0, its two methods that give the update are replaced on the instance.

A rank of 0 is one rank of zeros in a file. PEFT finds the wrappers of a module by their position, so a file without one
of them would load the weights of another parameter.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from torch import Tensor, nn

from lorank.lora.rank_layout import layout_of

_REPLACED = ("get_delta_factors", "get_delta_weight")
_NESTED = ".base_layer"


def is_expert(module: nn.Module) -> bool:
    """Whether a module of PEFT is the LoRA of a parameter."""
    return isinstance(module, ParamWrapper)


def parameter_name(path: str, module: ParamWrapper) -> str:
    """The full name of the parameter, as in PEFT's patterns.

    Args:
        path: the name of the wrapper, e.g. ``model.layers.0.mlp.experts.base_layer``.
    """
    holder = path
    while holder.endswith(_NESTED):
        holder = holder.removesuffix(_NESTED)
    return f"{holder}.{module.parameter_name}".lstrip(".")


def in_order(found: list[tuple[str, LoraLayer]]) -> Iterator[tuple[str, LoraLayer]]:
    """PEFT's layers in the order of the model. Of nested wrappers the innermost comes first: its parameter does too.

    Args:
        found: paths and layers, an outer module before those inside it.
    """
    nest: list[tuple[str, LoraLayer]] = []
    for path, module in found:
        if nest and not (is_expert(module) and path == nest[-1][0] + _NESTED):
            yield from reversed(nest)
            nest = []
        nest.append((path, module))
    yield from reversed(nest)


def update_expert_forward_(module: LoraLayer) -> None:
    """Makes the wrapper of a parameter use the gates of its adapters, and compute with rank 0.

    Call it whenever a gate or a rank has changed. With neither gates nor rank 0, the wrapper is as PEFT made it.
    """
    if not isinstance(module, ParamWrapper):
        return
    own = vars(module)
    if any(getattr(variant, "gate", None) is not None for variant in module.lora_variant.values()) or any(
        not rank for rank in module.r.values()
    ):
        own["get_delta_factors"] = partial(_delta_factors, module)
        own["get_delta_weight"] = partial(_delta_weight, module)
    else:
        for name in _REPLACED:
            own.pop(name, None)


def _delta_factors(module: ParamWrapper, adapter: str) -> tuple[Tensor, Tensor, float]:
    """PEFT's method, with the gate: (left, right, s), for which s · left @ right is the update of the parameter."""
    layout = layout_of(module)
    A = layout.by_expert(module.lora_A[adapter].weight, 0)  # (E, r, d)
    B = layout.by_expert(module.lora_B[adapter].weight, 1)  # (E, d', r)
    left, right = (B, A) if module._did_swap_in_out_features else (A.mT, B.mT)
    gate = getattr(module.lora_variant.get(adapter), "gate", None)
    dtype = module.get_param().dtype
    left, right = left.to(dtype), right.to(dtype)
    if gate is not None:
        left = left * gate.to(left)  # the last axis of the left factor has the ranks
    return left, right, module.scaling[adapter]


def _delta_weight(module: ParamWrapper, adapter: str, *_: Any, **__: Any) -> Tensor:
    """PEFT's method, with the gate: the update of the parameter, in its shape."""
    A, B = module.lora_A[adapter].weight, module.lora_B[adapter].weight
    gate = getattr(module.lora_variant.get(adapter), "gate", None)
    layout = layout_of(module)
    if gate is not None:
        B = B * layout.repeated(gate.to(B), B)
    if layout.experts == 1:
        update: Tensor = B @ A  # (d', d), the layout of a matrix, or of PEFT's one expert
    else:
        left, right = layout.by_expert(B, 1), layout.by_expert(A, 0)  # (E, d', r), (E, r, d)
        update = left @ right  # (E, d', d)
        update = update if module._did_swap_in_out_features else update.mT
    parameter = module.get_param()
    # PEFT adds to 8-bit floats in a wider type, and rounds once.
    dtype = update.dtype if parameter.dtype.itemsize == 1 else parameter.dtype
    scaled: Tensor = (update * module.scaling[adapter]).to(parameter.device, dtype)
    return scaled


def filler(module: LoraLayer, adapter: str) -> tuple[Tensor, Tensor]:
    """A and B of one rank of zeros: what a file holds for the parameter at rank 0."""
    experts = layout_of(module).experts
    A, B = module.lora_A[adapter].weight, module.lora_B[adapter].weight
    return A.new_zeros(experts, A.shape[1]), B.new_zeros(B.shape[0], experts)


def is_filler(experts: int, A: Tensor, B: Tensor) -> bool:
    """Whether weights from a file are one rank of zeros, which no training makes and none can leave."""
    is_one_rank = A.dim() == B.dim() == 2 and A.shape[0] == B.shape[1] == experts
    return is_one_rank and not bool(A.any()) and not bool(B.any())
