"""The gradient of a parameter that has a LoRA (``target_parameters``), as singular values and vectors of every expert.

Autograd gives ∂L/∂W of such a parameter as it is, (experts, …), so no inputs need to be watched. It is read by a hook
on the parameter, one parameter at a time, and only a projection of a large one is kept
(:mod:`lorank.scoring.weight_gradient`).

The experts share the number of ranks, and a rank has vectors of its own in each. So rank i takes the i-th singular
vectors of every expert, and is worth σ_i² = Σ_e σ_{e,i}².
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lorank.lora.layer import AdapterLayer


class ExpertGradientSum:
    """The sum over batches of G of one parameter, or of the range finder's projection of it.

    Args:
        layer: the layer.
        count: k, the number of singular values, if an expert has so many.
        seed: seed of the random directions Ω.
        residual: whether the directions that the rows of A reach already are taken out of G.
        limit: up to how many numbers G is summed in full.
        oversampling: p, the number of directions beside the k.
        rounding: values below this part of the whole are set to zero, if ``residual``.
    """

    def __init__(
        self,
        layer: AdapterLayer,
        count: int,
        seed: int,
        *,
        residual: bool,
        limit: int,
        oversampling: int,
        rounding: float,
    ) -> None:
        A = layer.layout.by_expert(layer.A.detach(), 0)  # (E, r, d_in)
        self.experts, d_in, d_out = layer.layout.experts, int(A.shape[2]), int(layer.B.shape[0])
        self._shape, self._rounding = (self.experts, d_out, d_in), rounding
        # The update has A's inputs on its last axis, or on its middle one in families that store (inputs, outputs).
        self._is_transposed = layer.module.get_param().dim() == 3 and not layer.module._did_swap_in_out_features
        self.count = min(count, d_in, d_out)
        self._width = min(self.count + oversampling, d_in, d_out)
        self.is_whole = self.experts * d_in * d_out <= limit or self._width == min(d_in, d_out)
        self._reached = _basis(A, rounding) if residual else None  # (E, d_in, ≤ r)
        self._omega: Tensor | None = None
        if not self.is_whole:
            generator = torch.Generator().manual_seed(seed % 2**63)
            omega = torch.randn(d_in, self._width, generator=generator).expand(self.experts, -1, -1)
            self._omega = self._outside(omega.double()).float()  # (E, d_in, k + p)
        self._q: Tensor | None = None  # (E, d_out, k + p), after the first pass
        self._total: Tensor | None = None
        self._done = False

    @torch.no_grad()
    def add(self, gradient: Tensor) -> None:
        """Adds the gradient of one batch, in the parameter's shape."""
        if self._done:
            return
        G = gradient.reshape(self.experts, *gradient.shape[-2:]).float()
        G = G.mT if self._is_transposed else G  # (E, d_out, d_in)
        if self._omega is not None:
            G = G @ self._omega.to(G.device) if self._q is None else self._q.to(G.device).mT @ G
        self._total = G.clone() if self._total is None else self._total + G

    def end_pass(self, mean: Callable[[Tensor], Tensor] | None) -> None:
        if mean is not None and not self._done:
            total = self._zeros() if self._total is None else self._total
            self._total = mean(total.flatten()).reshape(total.shape)
        if self._omega is not None and self._q is None:
            self._q = None if self._total is None else torch.linalg.qr(self._total).Q
            self._done = self._q is None  # the loss of no batch depends on this parameter
            self._total = None
        else:
            self._done = True

    def decompose(self, batches: int) -> tuple[Tensor, Tensor, Tensor]:
        """σ (k,), u (E·d_out, k) and v (E·d_in, k) of the mean over batches. Per expert, u and v are orthonormal."""
        G = (self._zeros() if self._total is None else self._total).double().cpu()  # (E, d_out or k + p, d_in)
        size = G.norm()
        G = self._outside(G.mT).mT
        left, values, right = torch.linalg.svd(G, full_matrices=False)
        left, values, right = left[..., : self.count], values[:, : self.count], right[:, : self.count].mT
        if self._q is not None:
            left = self._q.double().cpu() @ left
        if self._reached is not None:
            values = torch.where(values > self._rounding * size, values, 0)
        joint = torch.linalg.vector_norm(values, dim=0) / batches  # (k,)
        return joint, left.flatten(0, 1), right.flatten(0, 1)

    def _outside(self, vectors: Tensor) -> Tensor:
        """Vectors of inputs, (E, d_in, n), without the directions that are reached."""
        if self._reached is None:
            return vectors
        inside: Tensor = self._reached @ (self._reached.mT @ vectors)
        return vectors - inside

    def _zeros(self) -> Tensor:
        experts, d_out, d_in = self._shape
        if self._omega is None:
            return torch.zeros(self._shape)
        return torch.zeros(experts, d_out if self._q is None else self._width, self._width if self._q is None else d_in)


def _basis(A: Tensor, rounding: float) -> Tensor:
    """Per expert, an orthonormal basis of the rows of A, (E, d_in, ≤ r) float64; zeros where there are fewer."""
    left, values, _ = torch.linalg.svd(A.mT.double().cpu(), full_matrices=False)
    if not values.shape[1]:
        return torch.zeros_like(A.mT, dtype=torch.float64, device="cpu")
    spanned = values > rounding * values.amax(1, keepdim=True)
    basis: Tensor = left * spanned[:, None, :]
    return basis
