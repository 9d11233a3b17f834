"""Gates that are learned: one tensor of values and one of gradients for all ranks of all layers.

A layer's gate is a leaf of the graph whose data and whose ``.grad`` are views of the two. A backward pass therefore
fills one (R,) gradient, and a method updates all gates in one operation, however many layers there are. The gates are
apart from the model's parameters and from the user's optimiser: a learning-rate schedule, clipping and weight decay
that are meant for A and B do not touch them.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


class LearnedGates:
    """Trainable gates.

    Args:
        ranks: the rank of each layer, in order; R is their sum.
        values: (R,), copied to float32 at least; None: ones.
        device: where they live. A layer elsewhere copies its own, which is small.

    Attributes:
        values: (R,), to be changed in place under ``torch.no_grad()``.
        grad: (R,), what backward passes have added since :meth:`clear_grad`.
        leaves: each layer's gate, (r,).
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
        """Sets all gradients to zero; they stay where they are."""
        self.grad.zero_()

    def freeze(self, frozen: bool = True) -> None:
        """Whether backward passes leave the gates out."""
        for leaf in self.leaves.values():
            leaf.requires_grad_(not frozen)
