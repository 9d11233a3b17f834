"""Merges a layer's update into its base weight, and takes it out again, in every form of the layer.

    W' = W + s · B diag(g) A        DoRA: m · (W + s · B diag(g) A) / ‖W + s · B diag(g) A‖

PEFT computes the update from A and B alone, by ``get_delta_weight``. For a layer with a gate or with heads, that is
another update. :func:`plain_update` makes PEFT's layer use the A and B of the equivalent plain LoRA instead. All else,
DoRA's norm and the quantisation of the base, remains PEFT's.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer, LoraVariant
from torch import Tensor

from lorank.lora.variants.convolution import is_convolution


@contextmanager
def plain_update(module: LoraLayer, adapter: str, A: Tensor, B: Tensor) -> Iterator[None]:
    """Inside, PEFT's layer computes the adapter's update from ``A`` and ``B``.

    Args:
        A: (r, d_in), B: (d_out, r) of the equivalent plain LoRA.
    """
    before = vars(module).get("get_delta_weight")

    def get_delta_weight(name: str) -> Any:
        # PEFT may also take out and merge again the other adapters of the layer.
        return _update(module, adapter, A, B) if name == adapter else type(module).get_delta_weight(module, name)

    module.__dict__["get_delta_weight"] = get_delta_weight
    try:
        yield
    finally:
        del module.__dict__["get_delta_weight"]
        if before is not None:
            module.__dict__["get_delta_weight"] = before


@torch.no_grad()
def _update(module: LoraLayer, adapter: str, A: Tensor, B: Tensor) -> Tensor:
    """s · B A in the layout of the base weight: (d_out, d_in), or (d_in, d_out) for an embedding or a Conv1D.

    For a convolution: (d_out, inputs, kernel…).
    """
    wide = torch.promote_types(A.dtype, torch.float32)  # in 16 bits the product would be rounded once more
    if is_convolution(module):
        flat = B.flatten(1).to(wide) @ A.flatten(1).to(wide) * module.scaling[adapter]  # (d_out, inputs × kernel)
        kernels: Tensor = flat.reshape(B.shape[0], *A.shape[1:])
        return kernels.to(B.dtype)
    update = B.to(wide) @ A.to(wide) * module.scaling[adapter]  # (d_out, d_in)
    transposed = adapter in module.lora_embedding_A or module.fan_in_fan_out
    layout: Tensor = update.T if transposed else update
    return layout.to(B.dtype)


def merge_safe(module: LoraLayer, adapter: str, weight: Tensor, dora: LoraVariant | None) -> Tensor:
    """W', a new tensor. ``weight``: W in the layout of the base layer; ``dora``: PEFT's DoRA, if the layer uses it."""
    if dora is not None:
        merged: Tensor = dora.merge_safe(module, adapter, weight)
        return merged
    update: Tensor = module.get_delta_weight(adapter).to(weight.dtype)
    return weight + update


def merge_unsafe(module: LoraLayer, adapter: str, weight: Tensor, dora: LoraVariant | None) -> None:
    """W → W' in place."""
    if dora is not None:
        dora.merge_unsafe(module, adapter, weight)
    else:
        weight.data += module.get_delta_weight(adapter).to(weight.dtype)


def unmerge(module: LoraLayer, adapter: str, weight: Tensor, dora: LoraVariant | None) -> Tensor:
    """W, from ``weight`` = W'. The gate and the weights must be those of the merge."""
    if dora is not None:
        unmerged: Tensor = dora.unmerge(module, adapter, weight)
        return unmerged
    update: Tensor = module.get_delta_weight(adapter).to(weight.dtype)
    return weight.data - update
