"""DoRA with a gate (Liu et al., ICML 2024, arXiv 2402.09353): a learned magnitude per output row.

    W' = m · (W + s B diag(g) A) / ‖W + s B diag(g) A‖        norm per output row, a constant in the backward pass

For g = 1 this is PEFT's DoRA. A rank with gate zero contributes neither to the update nor to the norm.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.lora.variants import (
    DoraConv1dVariant,
    DoraConv2dVariant,
    DoraConv3dVariant,
    DoraEmbeddingVariant,
    DoraLinearVariant,
)
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn

from lorank.errors import AdapterError

VARIANTS = (DoraLinearVariant, DoraEmbeddingVariant, DoraConv1dVariant, DoraConv2dVariant, DoraConv3dVariant)


def is_dora(variant: Any) -> bool:
    """Whether ``variant`` is PEFT's DoRA of a linear layer, of an embedding or of a convolution."""
    return type(variant) in VARIANTS


def forward(
    module: LoraLayer,
    adapter: str,
    x: Tensor,
    result: Tensor,
    gate: Tensor,
    expand_gate: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    """Computes the layer's output, (n, …, d_out).

    Args:
        x: (n, …, d_in), or token ids (n, …).
        result: the base layer's output, (n, …, d_out).
        gate: (r,), or for linear layers (n, r) with a gate per sample.

    Raises:
        AdapterError: an embedding with a gate per sample.
    """
    if adapter in module.lora_embedding_A:
        return _embedding(module, adapter, x, result, gate)
    lora_A, lora_B = module.lora_A[adapter], module.lora_B[adapter]
    dropout, scaling = module.lora_dropout[adapter], module.scaling[adapter]
    magnitude = module.lora_magnitude_vector[adapter].weight  # (d_out,)
    base = module.get_base_layer()
    W = dequantize_module_weight(base).to(x.dtype)
    if module.fan_in_fan_out:
        W = W.T  # (d_out, d_in)
    norm = row_norms(W, lora_A.weight, lora_B.weight, scaling, gate)  # (d_out,) or (n, d_out)
    if module.training and not isinstance(dropout, nn.Identity):
        x = dropout(x)
        plain = F.linear(x, W)  # as in PEFT, the product with W also uses the dropped input
    else:
        plain = result if base.bias is None else result - base.bias  # (n, …, d_out)
    z = lora_A(x)  # (n, …, r)
    update = lora_B(z * expand_gate(gate, z)) * scaling  # (n, …, d_out)
    factor = expand_gate(magnitude / norm, update)  # m / ‖·‖, per output row
    output: Tensor = result + (factor - 1) * plain + factor * update
    return output


def _embedding(module: LoraLayer, adapter: str, x: Tensor, result: Tensor, gate: Tensor) -> Tensor:
    if gate.dim() != 1:
        raise AdapterError("an embedding with DoRA takes one gate per rank, not one per sample")
    A = module.lora_embedding_A[adapter]  # (r, number of embeddings)
    factor, update = module.lora_magnitude_vector[adapter](
        x,
        lora_A=(A * gate.to(A).unsqueeze(1)).T,
        lora_B=module.lora_embedding_B[adapter].T,
        scaling=module.scaling[adapter],
        base_layer=module.get_base_layer(),
        embed_fn=module._embed,
        adapter_name=adapter,
    )
    output: Tensor = factor * result + update
    return output


@torch.no_grad()
def row_norms(W: Tensor, A: Tensor, B: Tensor, scaling: float, gate: Tensor) -> Tensor:
    """‖W + s B diag(g) A‖ per output row, without autograd.

    A gate per sample would need one matrix per sample. The expanded square needs none:
    ‖W‖² + 2s · Σ_r g_r B_r (W Aᵀ)_r + s² · Σ_rr' g_r B_r (A Aᵀ)_rr' B_r' g_r'.

    Args:
        W: (d_out, d_in), A: (r, d_in), B: (d_out, r), gate: (r,) or (n, r).

    Returns:
        (d_out,) or (n, d_out).
    """
    W, B, gate = W.to(A.dtype), B.to(A.dtype), gate.to(A)
    if gate.dim() == 1:
        norms: Tensor = torch.linalg.norm(W + scaling * (B * gate) @ A, dim=1)
        return norms
    cross = gate @ (B * (W @ A.T)).T  # (n, d_out)
    gated = gate.unsqueeze(1) * B  # (n, d_out, r)
    square = ((gated @ (A @ A.T)) * gated).sum(-1)  # (n, d_out)
    total = W.square().sum(1) + 2 * scaling * cross + scaling**2 * square
    return total.clamp_min(0).sqrt()
