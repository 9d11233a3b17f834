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
        """What each rank owns of a tensor of A's shape (``axis`` 0) or B's shape (``axis`` 1): (r, numbers per rank)."""
        if self.experts == 1:
            return values.movedim(axis, 0).flatten(1)
        rank = self.rank(values.shape[axis])
        apart = (self.experts, rank) if axis == 0 else (rank, self.experts)
        return values.unflatten(axis, apart).movedim(1, 0).flatten(1)  # axis 1 has the ranks in both cases

    def norms(self, A: Tensor, B: Tensor) -> Tensor:
        """‖B_i A_i‖ of the update of every rank, (r,): over all experts, if there are any."""
        of_A, of_B = self.by_expert(A, 0).norm(dim=2), self.by_expert(B, 1).norm(dim=1)  # (E, r) each
        return (of_A * of_B).norm(dim=0)

    def by_expert(self, values: Tensor, axis: int) -> Tensor:
        """A tensor of A's shape as (E, r, d), or one of B's shape as (E, d', r). A view."""
        rank = self.rank(values.shape[axis])
        if axis == 0:
            return values.unflatten(0, (self.experts, rank))
        return values.unflatten(1, (rank, self.experts)).permute(2, 0, 1)

    def joined(self, values: Tensor, axis: int) -> Tensor:
        """The inverse of :meth:`by_expert`: (E, r, d) as (E·r, d), or (E, d', r) as (d', r·E)."""
        return values.flatten(0, 1) if axis == 0 else values.permute(1, 2, 0).flatten(1)

    def rows(self, values: Tensor) -> Tensor:
        """The rows of A of new ranks: (n, E·d) as (E·n, d), in the order of A."""
        if self.experts == 1:
            return values
        return values.unflatten(1, (self.experts, -1)).movedim(1, 0).flatten(0, 1)

    def repeated(self, gate: Tensor) -> Tensor:
        """A value per rank, (r,), as a value per column of B, (r·E,)."""
        return gate if self.experts == 1 else gate.repeat_interleave(self.experts)

    def turn(self, turn: Turn | None, axis: int) -> Turn | None:
        """How A (``axis`` 0) or B (``axis`` 1) turns, if the ranks of every expert turn alike."""
        if self.experts == 1 or turn is None:
            return turn
        own = torch.eye(self.experts, dtype=turn.weight.dtype)
        first = axis == 0
        return Turn(*(torch.kron(*((own, m) if first else (m, own))) for m in (turn.weight, turn.gradient)))
