"""Learned gates: one tensor of values and one of gradients for all ranks of all layers.

A layer's gate is a leaf of the autograd graph. Its data and its ``.grad`` are views of these two tensors. A backward
pass therefore fills one (R,) gradient, and a method updates the gates of all layers in one operation. The gates are
neither parameters of the model nor part of the user's optimiser: the learning-rate schedule, gradient clipping and
weight decay for A and B do not affect them.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


class LearnedGates:
    """The trainable gates of all layers.

    Args:
        ranks: the rank of each layer, in order; R is their sum.
        values: (R,), copied and converted to at least float32; None: ones.
        device: the device of the gates. A layer on another device copies its own gate, which is small.

    Attributes:
        values: (R,); change them in place under ``torch.no_grad()``.
        grad: (R,), the sum of the gradients of all backward passes since :meth:`clear_grad`.
        leaves: the gate of each layer, (r,).

    Raises:
        ValueError: ``values`` does not have shape (R,).
    """

    def __init__(self, ranks: Mapping[str, int], values: Tensor | None, device: torch.device) -> None:
        total = sum(ranks.values())
        if values is None:
            values = torch.ones(total)
        if values.shape != (total,):
            raise ValueError(f"gates for {total} ranks need shape ({total},), got {tuple(values.shape)}")
        dtype = torch.promote_types(values.dtype, torch.float32)
        self.values = values.detach().clone().to(device=device, dtype=dtype)
        self.grad = torch.zeros_like(self.values)
        self.leaves: dict[str, Tensor] = {}
        sizes = list(ranks.values())
        for name, value, grad in zip(
            ranks, torch.split(self.values, sizes), torch.split(self.grad, sizes), strict=True
        ):
            leaf = value.detach().requires_grad_()  # shares its memory with values
            leaf.grad = grad  # a backward pass adds to it in place
            self.leaves[name] = leaf

    def clear_grad(self) -> None:
        """Sets all gradients to zero in place."""
        self.grad.zero_()

    def freeze(self, frozen: bool = True) -> None:
        """Excludes the gates from backward passes (``frozen=True``), or includes them again."""
        for leaf in self.leaves.values():
            leaf.requires_grad_(not frozen)
