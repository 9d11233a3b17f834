"""The singular values and vectors of a module's update, without data and without forming it.

    B = Q_B R_B      Aᵀ = Q_A R_A      R_B R_Aᵀ = U Σ Vᵀ  (r × r)      B A = (Q_B U) Σ (Q_A V)ᵀ

This is balanced truncation with Z = A Aᵀ and D = Bᵀ B, that is, for inputs and output gradients that have no preferred
direction. The two QR decompositions avoid the squares in Z and D, so that small singular values keep their digits.

A convolution with groups has an update per group, and a rank is one rank of each. The i-th rank then has the i-th
singular vectors of every group, and σ_i is the root of the sum of their squares.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lorank.lora import AdapterLayer


class UpdateSvd:
    """The update B A of one layer as Σ_i σ_i u_i v_iᵀ, in float64.

    Args:
        layer: the layer. It is not changed.

    Attributes:
        values: σ, (k,), descending, with k = min(r, d_in, d_out). Without the factor s.
    """

    def __init__(self, layer: AdapterLayer) -> None:
        B, A = layer.B_matrix.double(), layer.A_matrix.double()
        groups = layer.axes[0].copies
        self._parts = [_svd(*part) for part in zip(B.chunk(groups, 0), A.chunk(groups, 1), strict=True)]
        self.values = torch.stack([values for values, _, _ in self._parts]).square().sum(0).sqrt()

    def factors(self, rank: int, norm: float, *, norm_of_A: bool) -> tuple[Tensor, Tensor]:
        """A (rank, d_in) and B (d_out, rank) of the best approximation of that rank.

        Args:
            rank: ≤ k.
            norm: the norm of each row of A; > 0.
            norm_of_A: False: the norm of each column of B instead.
        """
        norm = norm / math.sqrt(len(self._parts))
        found = []
        for values, left, right in self._parts:
            rows, columns = right[:, :rank].T * norm, left[:, :rank] * (values[:rank] / norm)
            if not norm_of_A:
                rows, columns = right[:, :rank].T * (values[:rank] / norm)[:, None], left[:, :rank] * norm
            found.append((rows, columns))
        return torch.cat([rows for rows, _ in found], 1), torch.cat([columns for _, columns in found], 0)


def _svd(B: Tensor, A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """σ (k,), u (d_out, k) and v (d_in, k) of B A."""
    Q_B, R_B = torch.linalg.qr(B)  # (d_out, ·), (·, r)
    Q_A, R_A = torch.linalg.qr(A.T)  # (d_in, ·), (·, r)
    U, values, Vh = torch.linalg.svd(R_B @ R_A.T, full_matrices=False)
    return values, Q_B @ U, Q_A @ Vh.T
