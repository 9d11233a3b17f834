"""The singular values and vectors of a module's update, without data and without forming it.

    B = Q_B R_B      Aᵀ = Q_A R_A      R_B R_Aᵀ = U Σ Vᵀ  (r × r)      B A = (Q_B U) Σ (Q_A V)ᵀ

This is balanced truncation with Z = A Aᵀ and D = Bᵀ B, that is, for inputs and output gradients that have no preferred
direction. The two QR decompositions avoid the squares in Z and D, so that small singular values keep their digits.

A convolution with groups and a parameter with experts have an update per block. They share the number of ranks, so rank
i has the i-th singular vectors of every block, and σ_i is the root of the sum of their squares.
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
        values: σ, (k,), descending, with k = min(r, d_in, d_out) (of one block). Without the factor s.
    """

    def __init__(self, layer: AdapterLayer) -> None:
        self._layout = layer.layout
        A = layer.layout.by_block(layer.A.detach().double(), 0)  # (blocks, r, d_in)
        B = layer.layout.by_block(layer.B.detach().double(), 1)  # (blocks, d_out, r)
        Q_B, R_B = torch.linalg.qr(B)  # (blocks, d_out, ·), (blocks, ·, r)
        Q_A, R_A = torch.linalg.qr(A.mT)  # (blocks, d_in, ·), (blocks, ·, r)
        U, self._values, Vh = torch.linalg.svd(R_B @ R_A.mT, full_matrices=False)
        self._left, self._right = Q_B @ U, Q_A @ Vh.mT  # (blocks, d_out, k), (blocks, d_in, k)
        self.values = torch.linalg.vector_norm(self._values, dim=0)

    def factors(self, rank: int, norm: float, *, norm_of_A: bool) -> tuple[Tensor, Tensor]:
        """A (rank, d_in) and B (d_out, rank) of the best approximation of that rank, as matrices.

        Args:
            rank: ≤ k.
            norm: the norm of each row of A; > 0.
            norm_of_A: False: the norm of each column of B instead.
        """
        norm = norm / math.sqrt(self._layout.blocks)
        rows, columns = self._right[..., :rank].mT, self._left[..., :rank]
        scaled = self._values[:, :rank] / norm  # (blocks, rank)
        if norm_of_A:
            rows, columns = rows * norm, columns * scaled[:, None, :]
        else:
            rows, columns = rows * scaled[:, :, None], columns * norm
        return self._layout.from_blocks(rows, 0), self._layout.from_blocks(columns, 1)
