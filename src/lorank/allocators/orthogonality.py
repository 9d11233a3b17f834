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


@torch.no_grad()
def add_orthogonality_gradient_(layers: AdapterLayers, gamma: float) -> None:
    """Adds γ ∂R/∂A and γ ∂R/∂B to the gradients of A and B in place. A weight without a gradient is skipped."""
    groups: dict[tuple[object, ...], list[tuple[Tensor, Tensor]]] = {}  # one product for all matrices of the same shape
    for layer in layers.values():
        for axis, weight in enumerate((layer.A, layer.B)):
            if weight.grad is None or not layer.rank:
                continue
            of_experts = (layer.layout.by_expert(values, axis) for values in (weight, weight.grad))  # views
            for rows, gradient in zip(*of_experts, strict=True):
                pair = (rows, gradient) if axis == 0 else (rows.T, gradient.T)  # (r, d) each
                groups.setdefault((pair[0].shape, rows.dtype, rows.device), []).append(pair)
    for pairs in groups.values():
        X = torch.stack([rows for rows, _ in pairs])  # (n, r, d)
        X = X.to(torch.promote_types(X.dtype, torch.float32))
        excess = X @ X.mT - torch.eye(X.shape[1], dtype=X.dtype, device=X.device)  # (n, r, r)
        added = (excess @ X).mul_(4 * gamma)  # (n, r, d)
        gradients = [gradient for _, gradient in pairs]
        torch._foreach_add_(gradients, list(added.to(gradients[0].dtype).unbind()))
