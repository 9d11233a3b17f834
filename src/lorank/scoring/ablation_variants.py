"""The variants of a model that ablation compares, and the loss of each.

    M           the unchanged model
    base        every rank of every module gated off
    M without r one rank of one module gated off
    r alone     every other rank of every module gated off

Both engines return the same :class:`VariantLosses`, at different speed. Estimates also have this form.
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
VariantSelection = Mapping[Term, Mapping[str, Sequence[int]]]
"""A selection of variants: per term and layer, the indices of their ranks, ascending."""

TERMS: Mapping[Terms, tuple[Term, ...]] = {
    "both": ("without", "alone"),
    "without": ("without",),
    "alone": ("alone",),
}


class IncompatibleError(Exception):
    """The exact engine does not support the model or the batch; the message gives the reason.

    Internal: it is always caught, and the reference engine runs instead.
    """


@dataclass(frozen=True)
class VariantLosses:
    """Losses of variants.

    Attributes:
        full: L(M), or None if it was not requested.
        base: L(base), or None if it was not requested.
        variants: per term and layer, the loss of the variant of each rank, (r,) float64 on the CPU; NaN for variants
            that were not requested.
        evaluations: number of variants that were evaluated by a forward pass, including M and the base model.
    """

    full: float | None
    base: float | None
    variants: Mapping[Term, dict[str, Tensor]]
    evaluations: int


class Engine(Protocol):
    """Computes the losses of variants."""

    def losses(
        self, wanted: VariantSelection, backgrounds: Collection[Term], report: Callable[[int], None]
    ) -> VariantLosses:
        """The losses of the wanted variants.

        Args:
            wanted: the variants.
            backgrounds: the models whose loss is also computed: M for ``without``, the base model for ``alone``.
            report: called with the number of variants that were evaluated since the last call.
        """
        ...

    def count(self, wanted: VariantSelection, backgrounds: Collection[Term]) -> int:
        """The number of variants, including backgrounds, that need a forward pass."""
        ...


def all_variants(layers: AdapterLayers, terms: Collection[Term]) -> VariantSelection:
    """The variants of all ranks."""
    return {term: {name: range(layer.rank) for name, layer in layers_with_ranks(layers)} for term in terms}


def flatten_variants(wanted: VariantSelection) -> list[tuple[Term, str, int]]:
    """The wanted variants as a list of (term, layer, rank), always in the same order."""
    return [(term, name, k) for term, layers in wanted.items() for name, ranks in layers.items() for k in ranks]


def group_variants(variants: Collection[tuple[Term, str, int]]) -> VariantSelection:
    """The inverse of :func:`flatten_variants`."""
    wanted: dict[Term, dict[str, list[int]]] = {}
    for term, name, k in variants:
        wanted.setdefault(term, {}).setdefault(name, []).append(k)
    return wanted


def unknown_losses(layers: AdapterLayers, terms: Collection[Term]) -> dict[Term, dict[str, Tensor]]:
    """Losses before any is computed: per term and layer (r,) float64, all NaN."""
    return {
        term: {name: torch.full((layer.rank,), torch.nan, dtype=torch.float64) for name, layer in layers.items()}
        for term in terms
    }


class Gates:
    """Sets the gates of all layers to the gates of a variant.

    A gate that the model already has (a learned gate) is part of M: a variant multiplies it by zeros and ones.

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
        """Sets the gates of the model that variants start from: M for ``without``, the base model for ``alone``."""
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
    """The ranks without effect: their row of A, their column of B or their gate is zero."""
    alive = (layer.A_matrix != 0).any(dim=1) & (layer.B_matrix != 0).any(dim=0)  # (r,)
    if gate is not None:
        alive &= gate.detach().to(alive.device) != 0
    return [k for k, alive_k in enumerate(alive.tolist()) if not alive_k]


def layers_with_ranks(layers: AdapterLayers) -> Iterator[tuple[str, AdapterLayer]]:
    """The layers whose rank is above 0."""
    return ((name, layer) for name, layer in layers.items() if layer.rank)


def describe(name: str, rank: int, term: Term) -> str:
    """A variant in words, for messages."""
    return f"the model without rank {rank} of {name}" if term == "without" else f"rank {rank} of {name} alone"


def describe_background(term: Term) -> str:
    """The model that the variants of a term start from, in words."""
    return "the model" if term == "without" else "the base model (all ranks off)"
