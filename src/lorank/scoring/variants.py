"""The variants of a model that ablation compares, and the loss of each.

    M           the model as it is
    base        every rank of every module gated off
    M without r one rank of one module gated off
    r alone     every other rank of every module gated off

Both engines return :class:`VariantLosses`; only how fast they get there differs. Estimates take the same form.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from lorank.errors import AdapterError
from lorank.lora.layer import AdapterLayer, AdapterLayers

Term = Literal["without", "alone"]
Terms = Literal["both", "without", "alone"]
Progress = Callable[[int, int], None]
Wanted = Mapping[Term, Mapping[str, Sequence[int]]]
"""Variants: per term and layer, of which ranks, in ascending order."""

TERMS: Mapping[Terms, tuple[Term, ...]] = {
    "both": ("without", "alone"),
    "without": ("without",),
    "alone": ("alone",),
}


class Unsuited(Exception):
    """The exact engine does not fit this model; the message says why. Never leaves the package: the reference runs."""


@dataclass(frozen=True)
class VariantLosses:
    """Losses of variants.

    Attributes:
        full: L(M), or None where nobody asked for it.
        base: L(base), likewise.
        variants: per term and layer, the loss of each of its ranks' variants, (r,) float64 on the CPU; NaN for those
            that nobody asked for.
        evaluations: how many variants a forward was run for, M and the base included.
    """

    full: float | None
    base: float | None
    variants: Mapping[Term, dict[str, Tensor]]
    evaluations: int


class Engine(Protocol):
    """Whatever gives the losses of variants."""

    def losses(self, wanted: Wanted, backgrounds: Collection[Term], report: Callable[[int], None]) -> VariantLosses:
        """The losses of the wanted variants, and of M (``without``) or the base (``alone``) where they are among the
        backgrounds; ``report`` is called with how many more variants are done."""
        ...

    def count(self, wanted: Wanted, backgrounds: Collection[Term]) -> int:
        """How many variants that takes a forward for."""
        ...


def every_rank(layers: AdapterLayers, terms: Collection[Term]) -> Wanted:
    """The variants of all ranks."""
    return {term: {name: range(layer.rank) for name, layer in in_order(layers)} for term in terms}


def flattened(wanted: Wanted) -> list[tuple[Term, str, int]]:
    """The wanted variants one by one, always in the same order."""
    return [(term, name, k) for term, layers in wanted.items() for name, ranks in layers.items() for k in ranks]


def grouped(variants: Collection[tuple[Term, str, int]]) -> Wanted:
    """The opposite of :func:`flattened`."""
    wanted: dict[Term, dict[str, list[int]]] = {}
    for term, name, k in variants:
        wanted.setdefault(term, {}).setdefault(name, []).append(k)
    return wanted


def nothing_known(layers: AdapterLayers, terms: Collection[Term]) -> dict[Term, dict[str, Tensor]]:
    """Losses to be filled in: per term and layer (r,) float64, all NaN."""
    return {
        term: {name: torch.full((layer.rank,), torch.nan, dtype=torch.float64) for name, layer in layers.items()}
        for term in terms
    }


class Gates:
    """Sets the gates of all layers to those of a variant.

    A gate that the model already has (a learned one) belongs to M: a variant multiplies it by zeros and ones.

    Args:
        layers: the layers, with the gates of M.

    Raises:
        AdapterError: a layer has a gate per sample, which has no single value to switch off.
    """

    def __init__(self, layers: AdapterLayers) -> None:
        self.layers = layers
        self.own = {name: layer.gate for name, layer in layers.items()}
        for name, gate in self.own.items():
            if gate is not None and gate.dim() != 1:
                raise AdapterError(
                    f"{name} has a gate per sample, shape {tuple(gate.shape)}: scoring needs one gate per "
                    f"rank, shape ({layers[name].rank},), or None"
                )
        self._ones = {
            name: layer.A.new_ones(layer.rank) if (gate := self.own[name]) is None else gate.detach().clone()
            for name, layer in layers.items()
        }  # (r,) each
        self._zeros = {name: torch.zeros_like(gate) for name, gate in self._ones.items()}  # (r,) each

    def ones(self, name: str) -> Tensor:
        """The gate of M, (r,)."""
        return self._ones[name]

    def background(self, term: Term) -> None:
        """Sets what surrounds the rank in question: M for ``without``, base for ``alone``."""
        for name, layer in self.layers.items():
            layer.gate = self.own[name] if term == "without" else self._zeros[name]

    def restore(self, name: str, term: Term) -> None:
        """Sets one layer's gate back to the background."""
        self.layers[name].gate = self.own[name] if term == "without" else self._zeros[name]

    def variants(self, name: str, term: Term) -> Tensor:
        """The gates of all variants of one layer, (r, r): row k is the gate for rank k."""
        ones = self._ones[name]  # (r,)
        eye = torch.eye(len(ones), dtype=ones.dtype, device=ones.device)  # (r, r)
        return ones * (1 - eye if term == "without" else eye)


def inert_ranks(layer: AdapterLayer, gate: Tensor | None) -> list[int]:
    """The ranks that add nothing: a row of A, a column of B or a gate that is all zeros."""
    alive = (layer.A.detach() != 0).any(dim=1) & (layer.B.detach() != 0).any(dim=0)  # (r,)
    if gate is not None:
        alive &= gate.detach().to(alive.device) != 0
    return [k for k, alive_k in enumerate(alive.tolist()) if not alive_k]


def in_order(layers: AdapterLayers) -> Iterator[tuple[str, AdapterLayer]]:
    """The layers that have a rank at all."""
    return ((name, layer) for name, layer in layers.items() if layer.rank)


def describe(name: str, rank: int, term: Term) -> str:
    """A variant in words, for messages."""
    return f"the model without rank {rank} of {name}" if term == "without" else f"rank {rank} of {name} alone"


def describe_background(term: Term) -> str:
    """What surrounds the variants of a term, in words."""
    return "the model" if term == "without" else "the base model, all ranks off,"
