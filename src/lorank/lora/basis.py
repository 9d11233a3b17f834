"""A change of basis of one layer's ranks. It changes A, B and the optimiser's moments, and not the function.

    A ← M A        B ← B M⁻¹        so that B A is the same        M: (r, r), invertible

With W' = M A, the chain rule turns the gradients by the inverse transposed matrix, ∂L/∂W' = M⁻ᵀ ∂L/∂A. For B, whose
rank axis is its columns, the two matrices change places. So every tensor with a rank axis turns in one of these ways:

- like a weight: the weights, copies and averages of them, and steps;
- like a gradient: gradients and their means over steps (first moments, exactly);
- like the square of a gradient: by the squares of the matrix's entries (second moments; exact if the gradients of
  different ranks are uncorrelated).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Basis:
    """A basis of a layer's ranks.

    Args:
        matrix: M, (r, r) float64 on the CPU; or (E, r, r), one for each of a layer's experts.
        inverse: M⁻¹, of the same shape. :func:`lorank.lora.resize_` refuses another matrix.
    """

    matrix: Tensor
    inverse: Tensor

    @property
    def rank(self) -> int:
        """r."""
        return int(self.matrix.shape[-1])

    def turn(self, axis: int) -> Turn:
        """How the tensors of A (``axis`` 0) or of B (``axis`` 1) turn."""
        dual = self.inverse.mT
        return Turn(self.matrix, dual) if axis == 0 else Turn(dual, self.matrix)

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Basis)
            and torch.equal(self.matrix, other.matrix)
            and torch.equal(self.inverse, other.inverse)
        )

    def __hash__(self) -> int:
        return hash(repr(self))

    def __repr__(self) -> str:
        """Holds a hash of the numbers, so that the texts of two bases are equal if and only if their bits are."""
        return f"Basis({self.rank}, {digest_of(self.matrix, self.inverse)})"


@dataclass(frozen=True)
class Turn:
    """The matrices that turn the tensors of one weight, (r, r) float64; (E, r, r) for experts, until their layout is
    known (:class:`lorank.lora.rank_layout.RankLayout`).

    Args:
        weight: for the weight itself.
        gradient: for its gradients.
    """

    weight: Tensor
    gradient: Tensor

    @property
    def square(self) -> Tensor:
        """For squares of gradients."""
        return self.gradient.square()

    @property
    def step_square(self) -> Tensor:
        """For squares of steps of the weight."""
        return self.weight.square()


def turn_ranks(values: Tensor, matrix: Tensor, axis: int) -> Tensor:
    """``values`` with its rank axis multiplied by a matrix: new[i] = Σ_j matrix[i, j] · values[j], in float64.

    Args:
        values: of any shape; its axis ``axis`` has r entries.
        matrix: (r, r).
    """
    wide = values.detach().double().movedim(axis, 0)  # (r, …)
    turned: Tensor = torch.tensordot(matrix.to(wide), wide, dims=1)  # (r, …)
    return turned.movedim(0, axis).to(values.dtype).contiguous()


def digest_of(*tensors: Tensor) -> str:
    """A short hash of tensors' bits."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()[:16]
