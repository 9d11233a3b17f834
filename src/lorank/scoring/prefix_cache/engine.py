"""The exact engine: the same losses as the reference engine, with fewer repeated computations.

- The blocks before the ablated layer do not depend on it. Two prefixes, of M (for ``without``) and of the base model
  (for ``alone``), advance block by block and store one hidden state each. A variant starts at the block of its ablated
  layer, and inside this block at the layer (:mod:`lorank.scoring.prefix_cache.layer_cache`).
- Several variants run stacked in one forward pass: the batch is repeated, and the ablated layer has a gate per sample.
- Only labelled positions get logits.
- A rank without effect (a new rank, with B = 0) needs no forward pass.

The engine assumes nothing about a model beyond the trace of one forward pass. Before it starts, the loss of one ablated
variant is compared with a plain forward pass. If they differ,
:class:`~lorank.scoring.ablation_variants.IncompatibleError` is raised.
"""

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
    flatten_variants,
    inert_ranks,
    layers_with_ranks,
    unknown_losses,
)
from lorank.scoring.microbatch import count_labels, split
from lorank.scoring.prefix_cache.compatibility import check_compatibility
from lorank.scoring.prefix_cache.variant_runner import VariantRunner


class ExactEngine:
    """Computes the losses of variants with fewer repeated computations.

    Used inside :func:`~lorank.scoring.preserve_state.preserve_state`.

    Args:
        batch: on the model's device.
        max_rows: the most samples in one forward pass. A larger batch is scored in parts, whose losses are summed.

    Raises:
        IncompatibleError: the engine does not support the model, its loss or its batch.
        ValidationBatchError: the loss of the model is NaN or infinite.
    """

    def __init__(self, model: nn.Module, layers: AdapterLayers, batch: Mapping[str, Any], max_rows: int | None) -> None:
        self.layers = layers
        self.gates = Gates(layers)
        self.parts = split(batch, max_rows)
        self.fit = check_compatibility(model, layers, max(self.parts, key=count_labels), max_rows)
        self.inert = {name: inert_ranks(layer, self.gates.own[name]) for name, layer in layers_with_ranks(layers)}

    def losses(
        self, wanted: VariantSelection, backgrounds: Collection[Term], report: Callable[[int], None]
    ) -> VariantLosses:
        """The losses of the wanted variants.

        Args:
            wanted: the variants.
            backgrounds: the models whose loss is also computed: M for ``without``, the base model for ``alone``.
            report: called with the number of variants that were evaluated since the last call.

        Raises:
            IncompatibleError: the model runs its blocks in another order than when it was traced.
        """
        inert = self._inert(wanted)
        needed = self._needed(inert, backgrounds)
        sums = unknown_losses(self.layers, wanted)
        totals: dict[Term, float] = {}
        done, count = 0, 0

        def one_part(variants: int) -> None:
            nonlocal done
            before, done = done, done + variants
            report(done // len(self.parts) - before // len(self.parts))

        for part in self.parts:
            runner = VariantRunner(self.fit, self.layers, self.gates, part, self.inert)
            with runner.patched():
                for term in sorted({*wanted, *needed}, reverse=True):  # "without" first
                    for name, ranks, losses in runner.run(term, wanted.get(term, {}), one_part):
                        known = sums[term][name][ranks].nan_to_num(0.0)  # (ranks,), summed over the previous parts
                        sums[term][name][ranks] = known + losses
                    if term in needed:
                        totals[term] = totals.get(term, 0.0) + runner.background(term, one_part)
            count += runner.targets.count
        found = {term: total / count for term, total in totals.items()}
        for term, of_term in sums.items():
            for name in of_term:
                of_term[name] /= count
                same = inert[term].get(name, [])
                if same:
                    of_term[name][same] = found[term]
        return VariantLosses(found.get("without"), found.get("alone"), sums, self.count(wanted, backgrounds))

    def count(self, wanted: VariantSelection, backgrounds: Collection[Term]) -> int:
        """The number of variants, including backgrounds, that need a forward pass."""
        inert = self._inert(wanted)
        return len(flatten_variants(wanted)) - len(flatten_variants(inert)) + len(self._needed(inert, backgrounds))

    def _inert(self, wanted: VariantSelection) -> dict[Term, dict[str, list[int]]]:
        """The wanted variants whose rank has no effect."""
        return {
            term: {name: [k for k in ranks if k in self.inert[name]] for name, ranks in layers.items()}
            for term, layers in wanted.items()
        }

    def _needed(self, inert: VariantSelection, backgrounds: Collection[Term]) -> set[Term]:
        """The backgrounds to evaluate: those requested, and those whose loss replaces that of an inert variant."""
        return {*backgrounds, *(term for term, layers in inert.items() if any(layers.values()))}
