"""Where the entries of a rank are in A and B.

A plain LoRA has one row of A and one column of B per rank. PEFT keeps the LoRA of a stack of E experts in one pair of
matrices, A (E·r, d) and B (d', r·E), and interleaves them differently:

    rank i of expert e:        row e·r + i of A        column i·E + e of B

So one rank owns E rows and E columns. This file says which, for a change of ranks and for sums over what a rank owns.
Everything else works on ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lorank.lora.basis import Turn


@dataclass(frozen=True)
class RankLayout:
    """The layout of A and B.

    Args:
        experts: E, the number of rows of A, and of columns of B, that one rank owns. ≥ 1; 1 for a plain LoRA.
    """

    experts: int = 1

    def rank(self, entries: int) -> int:
        """The rank of a weight with so many entries on its rank axis."""
        return entries // self.experts

    def entries(self, origins: Tensor, rank: int, axis: int) -> Tensor:
        """``origins`` of ranks as origins of rows of A (``axis`` 0) or of columns of B (``axis`` 1).

        Args:
            origins: (r',) int64, for each rank after a change its index before it, or −1 for a new rank.
            rank: r, the rank before the change.

        Returns:
            (E·r',) int64, in the order of the weight after the change.
        """
        if self.experts == 1:
            return origins
        own = torch.arange(self.experts)
        if axis == 0:
            before = own[:, None] * rank + origins  # (E, r')
            return torch.where(origins < 0, -1, before).flatten()
        before = origins[:, None] * self.experts + own  # (r', E)
        return torch.where(origins[:, None] < 0, -1, before).flatten()

    def by_rank(self, values: Tensor, axis: int) -> Tensor:
        """What each rank owns of a tensor of A's shape (``axis`` 0) or B's shape (``axis`` 1): (r, its numbers)."""
        if self.experts == 1:
            return values.movedim(axis, 0).flatten(1)
        return self._apart(values, axis).movedim(1, 0).flatten(1)

    def norms(self, A: Tensor, B: Tensor) -> Tensor:
        """‖B_i A_i‖ of the update of every rank, (r,): over all experts, if there are any."""
        of_A, of_B = self.by_expert(A, 0).norm(dim=2), self.by_expert(B, 1).norm(dim=1)  # (E, r) each
        norms: Tensor = (of_A * of_B).norm(dim=0)
        return norms

    def by_expert(self, values: Tensor, axis: int) -> Tensor:
        """A tensor of A's shape as (E, r, d), or one of B's shape as (E, d', r). A view."""
        apart = self._apart(values, axis)
        return apart if axis == 0 else apart.permute(2, 0, 1)

    def _apart(self, values: Tensor, axis: int) -> Tensor:
        """A's shape as (E, r, d), B's shape as (d', r, E): axis 1 has the ranks. A view."""
        rank = self.rank(values.shape[axis])
        if axis == 0:
            return values.view(self.experts, rank, *values.shape[1:])
        return values.view(values.shape[0], rank, self.experts)

    def joined(self, values: Tensor, axis: int) -> Tensor:
        """The inverse of :meth:`by_expert`: (E, r, d) as (E·r, d), or (E, d', r) as (d', r·E)."""
        return values.flatten(0, 1) if axis == 0 else values.permute(1, 2, 0).flatten(1)

    def rows(self, values: Tensor) -> Tensor:
        """The rows of A of new ranks: (n, E·d) as (E·n, d), in the order of A."""
        if self.experts == 1:
            return values
        count, width = values.shape
        return values.reshape(count, self.experts, width // self.experts).movedim(1, 0).flatten(0, 1)

    def repeated(self, gate: Tensor) -> Tensor:
        """A value per rank, (r,), as a value per column of B, (r·E,)."""
        return gate if self.experts == 1 else gate.repeat_interleave(self.experts)

    def turn(self, turn: Turn, axis: int) -> Turn:
        """How A (``axis`` 0) or B (``axis`` 1) turns, as matrices for all its rows or columns.

        The ranks of all experts turn alike, (r, r), or those of each by a matrix of its own, (E, r, r).
        """
        if self.experts == 1:
            return turn
        return Turn(*(self._blocks(matrix, axis) for matrix in (turn.weight, turn.gradient)))

    def _blocks(self, matrix: Tensor, axis: int) -> Tensor:
        """(E·r, E·r): the matrix of every expert at its own rows (``axis`` 0) or columns (``axis`` 1)."""
        experts, rank, own = self.experts, matrix.shape[-1], torch.arange(self.experts)
        matrices = matrix.expand(experts, rank, rank)
        if axis == 0:
            whole = matrix.new_zeros(experts, rank, experts, rank)
            whole[own, :, own, :] = matrices
        else:
            whole = matrix.new_zeros(rank, experts, rank, experts)
            whole[:, own, :, own] = matrices
        return whole.reshape(experts * rank, experts * rank)
