"""The naive engine: one whole forward per variant. Slow, works with every model, and obviously right."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

from torch import nn

from lorank.lora.layer import AdapterLayers
from lorank.scoring.loss import LossFn, own_loss, require_finite
from lorank.scoring.variants import (
    Gates,
    Term,
    VariantLosses,
    Wanted,
    describe,
    describe_background,
    flattened,
    nothing_known,
)


class ReferenceEngine:
    """Losses of variants, a whole forward each. Used inside :func:`~lorank.scoring.preserve_state.preserve_state`.

    Args:
        layers: with the gates of M, whatever a later call finds them set to.
        batch: on the model's device; run whole, whatever its size.
    """

    def __init__(
        self, model: nn.Module, layers: AdapterLayers, batch: Mapping[str, Any], loss_fn: LossFn | None
    ) -> None:
        self.model, self.layers, self.batch, self.loss_fn = model, layers, batch, loss_fn
        self.gates = Gates(layers)

    def losses(self, wanted: Wanted, backgrounds: Collection[Term], report: Callable[[int], None]) -> VariantLosses:
        """The losses of the wanted variants, see :class:`~lorank.scoring.variants.Engine`.

        Raises:
            ValidationBatchError: no loss, or one that is not finite.
        """
        gates = self.gates
        evaluations = 0

        def loss(what: str) -> float:
            nonlocal evaluations
            value = require_finite(own_loss(self.model, self.batch, self.loss_fn), what)
            evaluations += 1
            report(1)
            return value

        found: dict[Term, float] = {}
        variants = nothing_known(self.layers, wanted)
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

    def count(self, wanted: Wanted, backgrounds: Collection[Term]) -> int:
        """How many variants a forward is needed for: every one."""
        return len(flattened(wanted)) + len(backgrounds)
