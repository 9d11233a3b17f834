"""The sums of one layer's Gramians. They are collected by :mod:`lorank.lora.gramians`, which explains them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

SMALLEST = 1e-6
"""A token whose gradient is below this part of the largest one does not count. Where the gradient is zero, as at the
first query of a causal model, rounding may leave some of it."""


class LayerGramians:
    """The sums of one layer. A copy of it, made with a copy of the model, collects nothing.

    Args:
        rank: a function that returns the layer's present rank.
        in_training_mode: whether only forward passes in training mode count.

    Attributes:
        Z, D: (r, r) in float32 at least, or None before the first backward pass. (E, r, r) with E > 1 experts.
        tokens: the number of tokens in the sums, a tensor (), or None. (E,) with experts.
        collecting: whether passes are added.
    """

    def __init__(self, rank: Callable[[], int], *, in_training_mode: bool = True) -> None:
        self.rank, self.in_training_mode = rank, in_training_mode
        self.collecting = True
        self.Z: Tensor | None = None
        self.D: Tensor | None = None
        self.tokens: Tensor | None = None

    def wants(self, module: nn.Module) -> bool:
        """Whether a forward pass of the layer that begins now is to be added."""
        return self.collecting and (module.training or not self.in_training_mode)

    @torch.no_grad()
    def add(self, z: Tensor, dz: Tensor) -> None:
        """Adds the tokens of one backward pass. z, dz: (r, n), of any floating dtype."""
        if not z.numel() or not self.collecting:
            return
        dtype = torch.promote_types(z.dtype, torch.float32)
        z, dz = z.to(dtype), dz.to(dtype)
        counted = _counted(dz)
        z = z * counted
        self._add("Z", z @ z.T)
        self._add("D", dz @ dz.T)
        self._add("tokens", counted.sum())

    @torch.no_grad()
    def add_experts(self, z: Tensor, dz: Tensor, expert: Tensor, experts: int, *, swapped: bool) -> None:
        """Adds tokens of several experts. z, dz: (r, n); expert: (n,), a token of no expert has the index E.

        Args:
            experts: E.
            swapped: whether z comes from B and dz from A, so that Z and D change places in a change of basis.
        """
        if not z.numel() or not self.collecting:
            return
        counted = _counted(dz)
        z = z * counted
        own = [expert == index for index in range(experts)]
        Z, D = (torch.stack([part[:, some] @ part[:, some].T for some in own]) for part in (z, dz))  # (E, r, r)
        tokens = torch.stack([counted[some].sum() for some in own])  # (E,)
        if experts == 1:
            Z, D, tokens = Z[0], D[0], tokens[0]
        self._add("Z", D if swapped else Z)
        self._add("D", Z if swapped else D)
        self._add("tokens", tokens)

    def clear(self) -> None:
        """Forgets everything."""
        self.Z = self.D = self.tokens = None

    def _add(self, name: str, part: Tensor) -> None:
        total = getattr(self, name)
        setattr(self, name, part if total is None or total.shape != part.shape else total + part)

    def __deepcopy__(self, memo: object) -> LayerGramians:
        return _inert()

    def __reduce__(self) -> tuple[Any, ...]:
        return _inert, ()


def _counted(dz: Tensor) -> Tensor:
    """The tokens that the loss depends on, (n,) bool. dz: (r, n)."""
    size = dz.abs().amax(0)  # (n,)
    return size > SMALLEST * size.max()


def _inert() -> LayerGramians:
    own = LayerGramians(lambda: 0)
    own.collecting = False
    return own


class CollectedGramians(Protocol):
    """The sums of all layers, as a method and its run see them: :class:`lorank.lora.Gramians`."""

    @property
    def sums(self) -> Mapping[str, LayerGramians]: ...

    collecting: bool

    def watch(self) -> None: ...

    def clear(self) -> None: ...

    def unscale(self, factor: float) -> None: ...

    def remove(self) -> None: ...
