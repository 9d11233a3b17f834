"""The reference engine: one whole forward pass per variant. It is slow, simple and works with every model."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

from torch import nn

from lorank.lora.layer import AdapterLayers
from lorank.scoring.ablation_variants import (
    Gates,
    Term,
    VariantLosses,
    VariantSelection,
    describe,
    describe_background,
    flatten_variants,
    unknown_losses,
)
from lorank.scoring.loss import LossFn, detached_loss, require_finite


class ReferenceEngine:
    """Computes the loss of each variant by one whole forward pass.

    Used inside :func:`~lorank.scoring.preserve_state.preserve_state`.

    Args:
        layers: the layers, with the gates of M when the engine is made.
        batch: on the model's device; it is never split.
    """

    def __init__(
        self, model: nn.Module, layers: AdapterLayers, batch: Mapping[str, Any], loss_fn: LossFn | None
    ) -> None:
        self.model, self.layers, self.batch, self.loss_fn = model, layers, batch, loss_fn
        self.gates = Gates(layers)

    def losses(
        self, wanted: VariantSelection, backgrounds: Collection[Term], report: Callable[[int], None]
    ) -> VariantLosses:
        """The losses of the wanted variants, see :class:`~lorank.scoring.ablation_variants.Engine`.

        Raises:
            ValidationBatchError: there is no loss, or it is NaN or infinite.
        """
        gates = self.gates
        evaluations = 0

        def loss(what: str) -> float:
            nonlocal evaluations
            value = require_finite(detached_loss(self.model, self.batch, self.loss_fn), what)
            evaluations += 1
            report(1)
            return value

        found: dict[Term, float] = {}
        variants = unknown_losses(self.layers, wanted)
        for term in sorted({*wanted, *backgrounds}, reverse=True):  # "without" first
            gates.background(term)
            if term in backgrounds:
                found[term] = loss(describe_background(term))
            for name, ranks in wanted.get(term, {}).items():
                every = gates.variants(name, term)  # (r, r)
                for k in ranks:
                    self.layers[name].gate = every[k]  # (r,)
                    variants[term][name][k] = loss(describe(name, k, term))
                gates.restore(name, term)
        return VariantLosses(found.get("without"), found.get("alone"), variants, evaluations)

    def count(self, wanted: VariantSelection, backgrounds: Collection[Term]) -> int:
        """The number of forward passes: one per variant."""
        return len(flatten_variants(wanted)) + len(backgrounds)
