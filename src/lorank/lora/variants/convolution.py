"""The forward of a convolution's LoRA: gated, with DoRA, or of rank 0.

    y = W * x + s · B (g ⊙ (A * x))        A: (r, inputs, kernel…)   B: (d_out, r, 1…)   g: (r,)

PEFT's A is a convolution over all inputs with the kernel, the stride and the padding of W; B mixes the r channels at
each position. If W has G groups, A has G · r kernels, the r of each group one after another, and B reads for the
outputs of a group the r channels of this group (:mod:`lorank.lora.rank_layout`). A has no dilation and is padded with
zeros, whatever W has.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer, LoraVariant
from torch import Tensor, nn

from lorank.errors import AdapterError
from lorank.lora.rank_layout import CONVOLUTIONS, layout_of
from lorank.lora.variants.dora import is_dora, row_norms


def is_convolution(module: LoraLayer) -> bool:
    """Whether PEFT's layer is the LoRA of a convolution."""
    return isinstance(module, CONVOLUTIONS)


def merges_into_something_else(module: LoraLayer) -> str | None:
    """Why the merged weight of a convolution computes something else than its LoRA; None if it computes the same."""
    base = module.get_base_layer()
    if not is_convolution(module):
        return None
    if any(step != 1 for step in base.dilation):
        return f"the convolution has dilation {tuple(base.dilation)}, and PEFT's LoRA has none"
    if base.padding_mode != "zeros":
        return f"the convolution has padding_mode={base.padding_mode!r}, and PEFT's LoRA is padded with zeros"
    return None


class EmptyConvolution(LoraVariant):  # type: ignore[misc]  # PEFT is untyped
    """The forward of a convolution at rank 0: the base layer's output. torch cannot convolve to no channels."""

    def forward(self, module: LoraLayer, *, active_adapter: str, x: Tensor, result: Tensor, **_: Any) -> Tensor:
        return unchanged(module, active_adapter, result)

    def merge_safe(self, module: LoraLayer, active_adapter: str, orig_weight: Tensor) -> Tensor:
        return orig_weight

    def merge_unsafe(self, module: LoraLayer, active_adapter: str, orig_weight: Tensor) -> None:
        pass

    def unmerge(self, module: LoraLayer, active_adapter: str, orig_weight: Tensor) -> Tensor:
        return orig_weight.data


def unchanged(module: LoraLayer, adapter: str, result: Tensor) -> Tensor:
    """``result``, in whose graph the empty A and B are, as DDP and an optimiser expect of trained parameters."""
    if not torch.is_grad_enabled():
        return result
    nothing = module.lora_A[adapter].weight.sum() + module.lora_B[adapter].weight.sum()  # of no numbers: 0
    output: Tensor = result + nothing.to(result.dtype)
    return output


def forward(
    module: LoraLayer, adapter: str, x: Tensor, result: Tensor, gate: Tensor, replaced: LoraVariant | None
) -> Tensor:
    """Computes the layer's output with a gate, (n, d_out, positions…).

    Args:
        x: (n, inputs, positions…), or one sample without n.
        result: the base layer's output, (n, d_out, positions…).
        gate: (r,), or (n, r) with a gate per sample.
        replaced: the layer's variant without the gate: PEFT's DoRA, :class:`EmptyConvolution` or None.

    Raises:
        AdapterError: the first axis of ``x`` does not fit a gate per sample.
    """
    if not module.lora_A[adapter].weight.shape[0]:
        return unchanged(module, adapter, result)
    if is_dora(replaced):
        return _dora(module, adapter, x, result, gate)
    z = module.lora_A[adapter](module.lora_dropout[adapter](x))  # (n, G · r, …)
    update: Tensor = module.lora_B[adapter](z * _expand(gate, z, module)) * module.scaling[adapter]
    return result + update


def _expand(gate: Tensor, z: Tensor, module: LoraLayer, copies: int | None = None) -> Tensor:
    """The gate in the shape of z: (G · r, 1…) or (n, G · r, 1…)."""
    copies = layout_of(module).groups if copies is None else copies
    gate = gate.to(device=z.device, dtype=z.dtype)
    positions = module.get_base_layer().weight.dim() - 2
    gate = gate.repeat(*[1] * (gate.dim() - 1), copies)  # (…, G · r), as the rows of A
    if gate.dim() == 2:
        samples = len(gate)
        if z.dim() != positions + 2 or len(z) % samples:
            raise AdapterError(
                f"gates for {samples} samples do not fit the output of a convolution's A, of shape {tuple(z.shape)}: "
                "the first axis must count samples, or samples × images"
            )
        gate = gate.repeat_interleave(len(z) // samples, dim=0)  # (n, G · r)
    return gate.reshape(*gate.shape, *[1] * positions)


def _dora(module: LoraLayer, adapter: str, x: Tensor, result: Tensor, gate: Tensor) -> Tensor:
    """As PEFT's DoRA of a convolution, with W + s B diag(g) A in place of W + s B A."""
    lora_A, lora_B = module.lora_A[adapter], module.lora_B[adapter]
    dropout, scaling = module.lora_dropout[adapter], module.scaling[adapter]
    base = module.get_base_layer()
    magnitude = module.lora_magnitude_vector[adapter].weight  # (1, d_out, 1…)
    W, A, B = (part.weight.flatten(1) for part in (base, lora_A, lora_B))
    norm = row_norms(W, A, B, scaling, gate)  # (d_out,) or (n, d_out)
    if module.training and not isinstance(dropout, nn.Identity):
        x = dropout(x)
        plain = base._conv_forward(x, base.weight, None)  # as in PEFT, W also sees the dropped input
    else:
        plain = result if base.bias is None else result - _expand(base.bias, result, module, 1)
    z = lora_A(x)  # (n, r, …)
    update = lora_B(z * _expand(gate, z, module)) * scaling
    factor = _expand(magnitude.flatten() / norm, update, module, 1)  # m / ‖·‖, per output channel
    output: Tensor = result + (factor - 1) * plain + factor * update
    return output


def channels_by_rank(z: Tensor, module: LoraLayer) -> Tensor:
    """The output of A, (n, G · r, positions…), as (r, tokens): every position of every group is a token."""
    channels = z.movedim(-module.get_base_layer().weight.dim() + 1, 0)  # (G · r, n, positions…), also without n
    by_group = channels.reshape(layout_of(module).groups, -1, channels.shape[1:].numel())  # (G, r, ·)
    return by_group.transpose(0, 1).flatten(1)
