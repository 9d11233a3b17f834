"""The exact engine: the losses of the naive one, with less computed twice.

- The blocks before the ablated one see nothing of it. Two prefixes, of M (for ``without``) and of the base (for
  ``alone``), advance block by block, one hidden state each, and a variant starts at the block that it changes, there
  at the layer (:mod:`lorank.scoring.prefix_cache.layer_cache`).
- Several variants run stacked in one forward: the batch repeated, and a gate per sample on the ablated layer.
- Only labelled positions get logits.
- A rank that adds nothing (a new one, with B = 0) needs no forward.

Nothing is assumed about a model that one watched forward has not shown, and before the runner begins one ablated
variant is compared with a plain forward. Where anything differs, :class:`~lorank.scoring.variants.Unsuited` is raised.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

from torch import nn

from lorank.lora.layer import AdapterLayers
from lorank.scoring.microbatch import labelled, split
from lorank.scoring.prefix_cache.compatibility import check_compatibility
from lorank.scoring.prefix_cache.variant_runner import VariantRunner
from lorank.scoring.variants import Gates, Term, VariantLosses, Wanted, flattened, in_order, inert_ranks, nothing_known


class ExactEngine:
    """Losses of variants, with less computed twice. Used inside :func:`~lorank.scoring.preserve_state.preserve_state`.

    Args:
        batch: on the model's device.
        max_rows: samples in one forward. A larger batch is scored in parts, whose losses add up.

    Raises:
        Unsuited: the model, its loss or its batch does not allow it.
        ValidationBatchError: a loss of the model that is not finite.
    """

    def __init__(self, model: nn.Module, layers: AdapterLayers, batch: Mapping[str, Any], max_rows: int | None) -> None:
        self.layers = layers
        self.gates = Gates(layers)
        self.parts = split(batch, max_rows)
        self.fit = check_compatibility(model, layers, max(self.parts, key=labelled), max_rows)
        self.dead = {name: inert_ranks(layer, self.gates.own[name]) for name, layer in in_order(layers)}

    def losses(self, wanted: Wanted, backgrounds: Collection[Term], report: Callable[[int], None]) -> VariantLosses:
        """The losses of the wanted variants.

        Args:
            backgrounds: whose loss is wanted too: of M (``without``), of the base (``alone``).
            report: called with how many more variants are done.

        Raises:
            Unsuited: the model runs otherwise than when it was watched.
        """
        dead = self._dead(wanted)
        needed = self._needed(dead, backgrounds)
        sums = nothing_known(self.layers, wanted)
        totals: dict[Term, float] = {}
        done, count = 0, 0

        def one_part(variants: int) -> None:
            nonlocal done
            before, done = done, done + variants
            report(done // len(self.parts) - before // len(self.parts))

        for part in self.parts:
            runner = VariantRunner(self.fit, self.layers, self.gates, part, self.dead)
            with runner.patched():
                for term in sorted({*wanted, *needed}, reverse=True):  # "without" first
                    for name, ranks, losses in runner.run(term, wanted.get(term, {}), one_part):
                        known = sums[term][name][ranks].nan_to_num(0.0)  # (ranks,), of the parts before
                        sums[term][name][ranks] = known + losses
                    if term in needed:
                        totals[term] = totals.get(term, 0.0) + runner.background(term, one_part)
            count += runner.targets.count
        found = {term: total / count for term, total in totals.items()}
        for term, of_term in sums.items():
            for name in of_term:
                of_term[name] /= count
                same = dead[term].get(name, [])
                if same:
                    of_term[name][same] = found[term]
        return VariantLosses(found.get("without"), found.get("alone"), sums, self.count(wanted, backgrounds))

    def count(self, wanted: Wanted, backgrounds: Collection[Term]) -> int:
        """How many variants a forward is needed for."""
        dead = self._dead(wanted)
        return len(flattened(wanted)) - len(flattened(dead)) + len(self._needed(dead, backgrounds))

    def _dead(self, wanted: Wanted) -> dict[Term, dict[str, list[int]]]:
        """Those that add nothing."""
        return {
            term: {name: [k for k in ranks if k in self.dead[name]] for name, ranks in layers.items()}
            for term, layers in wanted.items()
        }

    def _needed(self, dead: Wanted, backgrounds: Collection[Term]) -> set[Term]:
        """The backgrounds whose losses are wanted, or are those of variants that add nothing."""
        return {*backgrounds, *(term for term, layers in dead.items() if any(layers.values()))}
