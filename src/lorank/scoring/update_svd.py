"""The singular values and vectors of a module's update, without data and without forming it.

    B = Q_B R_B      Aᵀ = Q_A R_A      R_B R_Aᵀ = U Σ Vᵀ  (r × r)      B A = (Q_B U) Σ (Q_A V)ᵀ

This is balanced truncation with Z = A Aᵀ and D = Bᵀ B, that is, for inputs and output gradients that have no preferred
direction. The two QR decompositions avoid the squares in Z and D, so that small singular values keep their digits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lorank.lora import AdapterLayer


class UpdateSvd:
    """The update B A of one layer as Σ_i σ_i u_i v_iᵀ, in float64.

    Args:
        layer: the layer. It is not changed.

    Attributes:
        values: σ, (k,), descending, with k = min(r, d_in, d_out). Without the factor s.
        left: u, (d_out, k), orthonormal columns.
        right: v, (d_in, k), orthonormal columns.
    """

    def __init__(self, layer: AdapterLayer) -> None:
        B, A = layer.B.detach().double(), layer.A.detach().double()
        Q_B, R_B = torch.linalg.qr(B)  # (d_out, ·), (·, r)
        Q_A, R_A = torch.linalg.qr(A.T)  # (d_in, ·), (·, r)
        U, self.values, Vh = torch.linalg.svd(R_B @ R_A.T, full_matrices=False)
        self.left, self.right = Q_B @ U, Q_A @ Vh.T

    def factors(self, rank: int, norm: float, *, norm_of_A: bool) -> tuple[Tensor, Tensor]:
        """A (rank, d_in) and B (d_out, rank) of the best approximation of that rank.

        Args:
            rank: ≤ k.
            norm: the norm of each row of A; > 0.
            norm_of_A: False: the norm of each column of B instead.
        """
        rows, columns = self.right[:, :rank].T * norm, self.left[:, :rank] * (self.values[:rank] / norm)
        if not norm_of_A:
            rows, columns = self.right[:, :rank].T * (self.values[:rank] / norm)[:, None], self.left[:, :rank] * norm
        return rows, columns
