"""Where the ranks of a layer lie in A, in B, and in every tensor of their shapes.

In a linear map, rank i is row i of A (axis 0) and column i of B (axis 1). In other layers a rank owns several entries
of an axis:

- A convolution with G groups has in A, for every group, r kernels over all inputs, and in B one column per rank for all
  groups. So rank i owns the rows i, r + i, 2r + i, … of A, and column i of B.
- PEFT keeps the LoRA of a stack of E experts in one pair of matrices, A (E·r, d) and B (d', r·E), and interleaves them
  differently: rank i of expert e is row e·r + i of A, and column i·E + e of B.

The rest of the package computes with matrices, A as (r, d_in) and B as (d_out, r), whatever their shapes are; or with
blocks, one pair of matrices per group or expert, whose products do not mix.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from peft.tuners.lora.layer import Conv1d, Conv2d, Conv3d, LoraLayer, ParamWrapper
from torch import Tensor

from lorank.lora.basis import Turn

CONVOLUTIONS = (Conv1d, Conv2d, Conv3d)


@dataclass(frozen=True)
class RankAxis:
    """The rank axis of one factor.

    Args:
        axis: 0 for A, 1 for B.
        copies: the number of entries of the axis that belong to each rank.
        interleaved: their order: entry i · copies + c is copy c of rank i; else entry c · r + i.
    """

    axis: int
    copies: int = 1
    interleaved: bool = False

    def rank(self, values: Tensor) -> int:
        """The rank of a tensor of the factor's shape."""
        return int(values.shape[self.axis]) // self.copies

    def expand_origins(self, origins: Tensor, rank: int) -> Tensor:
        """The old index of each entry of the axis, or −1.

        Args:
            origins: (ranks after,) int64, the old index of each rank, or −1 for a new rank.
            rank: r before the change.
        """
        if self.copies == 1:
            return origins
        own = torch.arange(self.copies)
        if self.interleaved:
            return torch.where(origins[:, None] < 0, -1, origins[:, None] * self.copies + own).flatten()
        return torch.where(origins < 0, -1, origins + rank * own[:, None]).flatten()

    def expand_turn(self, turn: Turn) -> Turn:
        """The turn of all entries of the axis.

        The copies turn alike, by matrices (r, r), or each by a matrix of its own, (copies, r, r).
        """
        if self.copies == 1:
            return turn
        return Turn(*(self._expand(matrix) for matrix in (turn.weight, turn.gradient)))

    def _expand(self, matrix: Tensor) -> Tensor:
        """(copies · r, copies · r): the matrix of every copy at its own entries."""
        copies, rank, own = self.copies, matrix.shape[-1], torch.arange(self.copies)
        matrices = matrix.expand(copies, rank, rank)
        if self.interleaved:
            whole = matrix.new_zeros(rank, copies, rank, copies)
            whole[:, own, :, own] = matrices
        else:
            whole = matrix.new_zeros(copies, rank, copies, rank)
            whole[own, :, own, :] = matrices
        return whole.reshape(copies * rank, copies * rank)

    def matrix(self, values: Tensor) -> Tensor:
        """A tensor of the factor's shape as a matrix: (r, d_in) for A, (d_out, r) for B. A view where that is possible.

        Where a rank owns several entries, they are one after another in its row.
        """
        if self.copies == 1 and values.dim() == 2:
            return values
        rank = self.rank(values)
        entries = values.movedim(self.axis, 0)  # (copies · r, …)
        if self.interleaved:
            by_rank = entries.reshape(rank, self.copies, *entries.shape[1:])
        else:
            by_rank = entries.reshape(self.copies, rank, *entries.shape[1:]).transpose(0, 1)
        rows: Tensor = by_rank.reshape(rank, by_rank.shape[1:].numel())  # (r, d)
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
        by_rank = rows.reshape(len(rows), self.copies, *others)
        entries = by_rank if self.interleaved else by_rank.transpose(0, 1)
        found: Tensor = entries.reshape(self.copies * len(rows), *others).movedim(0, self.axis)
        return found


@dataclass(frozen=True)
class RankLayout:
    """The layout of A and B.

    Args:
        experts: E, of a parameter with a stack of experts; else 1.
        groups: G, of a convolution; else 1.
    """

    experts: int = 1
    groups: int = 1

    @property
    def axes(self) -> tuple[RankAxis, RankAxis]:
        """The rank axes of A and of B."""
        return (
            RankAxis(0, self.experts * self.groups),
            RankAxis(1, self.experts, interleaved=self.experts > 1),
        )

    @property
    def blocks(self) -> int:
        """The number of updates that do not mix: one per expert or group."""
        return self.experts * self.groups

    def by_block(self, values: Tensor, axis: int) -> Tensor:
        """A tensor of A's shape (``axis`` 0) as (blocks, r, d), or one of B's shape as (blocks, d', r)."""
        matrix = self.axes[axis].matrix(values)
        if axis == 0:
            rank, width = matrix.shape
            return matrix.reshape(rank, self.blocks, width // self.blocks).movedim(1, 0)
        width, rank = matrix.shape
        return matrix.reshape(self.blocks, width // self.blocks, rank)

    def from_blocks(self, values: Tensor, axis: int) -> Tensor:
        """The matrix (r, d_in) or (d_out, r) of blocks (blocks, r, d) or (blocks, d', r)."""
        return values.movedim(0, 1).flatten(1) if axis == 0 else values.flatten(0, 1)

    def by_expert(self, values: Tensor, axis: int) -> Tensor:
        """A tensor of A's shape as (E, r, d), or one of B's shape as (E, d', r). A view for experts."""
        if self.experts == 1:
            return self.axes[axis].matrix(values)[None]
        rank = self.axes[axis].rank(values)
        if axis == 0:
            return values.view(self.experts, rank, values.shape[1])
        return values.view(values.shape[0], rank, self.experts).permute(2, 0, 1)

    def joined(self, values: Tensor, axis: int, shape: torch.Size) -> Tensor:
        """The inverse of :meth:`by_expert`.

        Args:
            values: (E, r, d) or (E, d', r).
            axis: 0 for A, 1 for B.
            shape: a shape of the factor; its rank axis may have any length.
        """
        if self.experts == 1:
            return self.axes[axis].tensor(values[0], shape)
        return values.flatten(0, 1) if axis == 0 else values.permute(1, 2, 0).flatten(1)

    def norms(self, A: Tensor, B: Tensor) -> Tensor:
        """‖B_i A_i‖ of the update of every rank, (r,): over all experts, if there are any."""
        of_A, of_B = self.by_expert(A, 0).norm(dim=2), self.by_expert(B, 1).norm(dim=1)  # (E, r) each
        norms: Tensor = (of_A * of_B).norm(dim=0)
        return norms

    def repeated(self, gate: Tensor, B: Tensor) -> Tensor:
        """A value per rank, (r,), in a shape that multiplies B."""
        gate = gate if self.experts == 1 else gate.repeat_interleave(self.experts)
        return gate.reshape(-1, *[1] * (B.dim() - 2))


def layout_of(module: LoraLayer) -> RankLayout:
    """The layout of the A and B of one of PEFT's layers."""
    if isinstance(module, ParamWrapper):
        return RankLayout(experts=int(module.num_experts))
    if isinstance(module, CONVOLUTIONS):
        return RankLayout(groups=int(module.get_base_layer().groups))
    return RankLayout()
