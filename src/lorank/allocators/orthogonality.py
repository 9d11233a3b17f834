"""The gradient of AdaLoRA's regulariser in closed form. The regulariser keeps P and Q near orthonormal.

    R(P, Q) = ‖PᵀP − I‖² + ‖QQᵀ − I‖²        ∂R/∂P = 4 P (PᵀP − I)        ∂R/∂Q = 4 (QQᵀ − I) Q

with the squared Frobenius norm, summed over the modules (arXiv 2303.10512, equations 4 and 5). P is B, (d_out, r), and
Q is A, (r, d_in). The gradient is added after the backward pass. This has the same effect as a term of the loss, but
the reported loss, in training and in evaluation, remains the task's loss.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lorank.lora import AdapterLayers
from lorank.lora.rank_axis import RankAxis


@torch.no_grad()
def add_orthogonality_gradient_(layers: AdapterLayers, gamma: float) -> None:
    """Adds γ ∂R/∂A and γ ∂R/∂B to the gradients of A and B in place. A weight without a gradient is skipped."""
    groups: dict[
        tuple[object, ...], list[tuple[Tensor, Tensor, Tensor, RankAxis]]
    ] = {}  # one product for all matrices of the same shape
    for layer in layers.values():
        for weight, axis in zip((layer.A, layer.B), layer.axes, strict=True):
            if weight.grad is None or not layer.rank:
                continue
            matrix = axis.matrix(weight.detach())
            rows = matrix if axis.axis == 0 else matrix.T  # (r, d)
            groups.setdefault((rows.shape, rows.dtype, rows.device), []).append((rows, weight, weight.grad, axis))
    for members in groups.values():
        X = torch.stack([rows for rows, *_ in members])  # (n, r, d)
        X = X.to(torch.promote_types(X.dtype, torch.float32))
        excess = X @ X.mT - torch.eye(X.shape[1], dtype=X.dtype, device=X.device)  # (n, r, r)
        added = (excess @ X).mul_(4 * gamma)  # (n, r, d)
        gradients = [gradient for _, _, gradient, _ in members]
        shaped = [
            axis.tensor(part if axis.axis == 0 else part.T, weight.shape).to(gradient)
            for part, (_, weight, gradient, axis) in zip(added.unbind(), members, strict=True)
        ]
        torch._foreach_add_(gradients, shaped)
