"""The gradient of AdaLoRA's regulariser in closed form. The regulariser keeps P and Q near orthonormal.

    R(P, Q) = ‖PᵀP − I‖² + ‖QQᵀ − I‖²        ∂R/∂P = 4 P (PᵀP − I)        ∂R/∂Q = 4 (QQᵀ − I) Q

with the squared Frobenius norm, summed over the modules (arXiv 2303.10512, equations 4 and 5), and over the experts of
a module that has experts. P is B, (d_out, r), and Q is A, (r, d_in). The gradient is added after the backward pass.
This has the same effect as a term of the loss, but the reported loss, in training and in evaluation, remains the task's
loss.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lorank.lora import AdapterLayers
from lorank.lora.rank_layout import RankLayout


@torch.no_grad()
def add_orthogonality_gradient_(layers: AdapterLayers, gamma: float) -> None:
    """Adds γ ∂R/∂A and γ ∂R/∂B to the gradients of A and B in place. A weight without a gradient is skipped."""
    groups: dict[
        tuple[object, ...], list[tuple[Tensor, Tensor, RankLayout, int]]
    ] = {}  # one product for all matrices of the same shape
    for layer in layers.values():
        for axis, weight in zip(layer.axes, (layer.A, layer.B), strict=True):
            if weight.grad is None or not layer.rank:
                continue
            parts = layer.layout.by_expert(weight.detach(), axis.axis)  # (E, r, d) or (E, d', r)
            rows = parts if axis.axis == 0 else parts.mT  # (E, r, d)
            groups.setdefault((rows.shape, rows.dtype, rows.device), []).append(
                (rows, weight.grad, layer.layout, axis.axis)
            )
    for members in groups.values():
        X = torch.stack([rows for rows, *_ in members])  # (n, E, r, d)
        X = X.to(torch.promote_types(X.dtype, torch.float32))
        excess = X @ X.mT - torch.eye(X.shape[-2], dtype=X.dtype, device=X.device)  # (n, E, r, r)
        added = (excess @ X).mul_(4 * gamma)  # (n, E, r, d)
        gradients = [gradient for _, gradient, *_ in members]
        shaped = [
            layout.joined(part if axis == 0 else part.mT, axis, gradient.shape).to(gradient)
            for part, (_, gradient, layout, axis) in zip(added.unbind(), members, strict=True)
        ]
        torch._foreach_add_(gradients, shaped)
