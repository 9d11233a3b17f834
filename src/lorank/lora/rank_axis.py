"""Where the ranks of a layer lie in A, in B, and in every tensor of their shapes.

In a linear map, rank i is row i of A (axis 0) and column i of B (axis 1). In other layers a rank owns several entries
of an axis. A convolution with G groups has in A, for every group, r kernels over all inputs, and in B one column per
rank for all groups: so rank i owns the G rows i, r + i, 2r + i, … of A, and column i of B.

The rest of the package computes with matrices: A as (r, d_in) and B as (d_out, r), whatever their shapes are.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lorank.lora.basis import Turn


@dataclass(frozen=True)
class RankAxis:
    """The rank axis of one factor.

    Args:
        axis: 0 for A, 1 for B.
        copies: the number of entries of the axis that belong to each rank. They are copy-major: entry c · r + i is
            copy c of rank i.
    """

    axis: int
    copies: int = 1

    def expand_origins(self, origins: Tensor, rank: int) -> Tensor:
        """The old index of each entry of the axis, or −1.

        Args:
            origins: (ranks after,) int64, the old index of each rank, or −1 for a new rank.
            rank: r before the change.
        """
        if self.copies == 1:
            return origins
        starts = rank * torch.arange(self.copies).unsqueeze(1)  # (copies, 1)
        return torch.where(origins < 0, -1, origins + starts).flatten()  # (copies, ranks after) → (copies · ranks,)

    def expand_turn(self, turn: Turn) -> Turn:
        """The turn of all entries of the axis: every copy turns as the ranks do."""
        if self.copies == 1:
            return turn
        eye = torch.eye(self.copies, dtype=turn.weight.dtype)
        return Turn(torch.kron(eye, turn.weight.contiguous()), torch.kron(eye, turn.gradient.contiguous()))

    def matrix(self, values: Tensor) -> Tensor:
        """A tensor of the factor's shape as a matrix: (r, d_in) for A, (d_out, r) for B. A view where that is possible.

        Where a rank owns several entries, they are one after another in its row.
        """
        if self.copies == 1 and values.dim() == 2:
            return values
        entries = values.movedim(self.axis, 0)  # (copies · r, …)
        by_copy = entries.reshape(self.copies, entries.shape[0] // self.copies, *entries.shape[1:])
        rows: Tensor = by_copy.transpose(0, 1).reshape(by_copy.shape[1], -1 if by_copy.shape[1] else 0)  # (r, d)
        return rows if self.axis == 0 else rows.T

    def tensor(self, matrix: Tensor, shape: torch.Size) -> Tensor:
        """The inverse of :meth:`matrix`.

        Args:
            matrix: (r, d_in) or (d_out, r), for any r.
            shape: a shape of the factor; its rank axis may have any length.
        """
        if self.copies == 1 and len(shape) == 2:
            return matrix
        rows = matrix if self.axis == 0 else matrix.T  # (r, d)
        others = [size for axis, size in enumerate(shape) if axis != self.axis]
        entries = rows.reshape(len(rows), self.copies, *others).transpose(0, 1)  # (copies, r, …)
        found: Tensor = entries.reshape(self.copies * len(rows), *others).movedim(0, self.axis)
        return found
