"""Runs all variants on one part of the batch, block by block, for the exact engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lorank.lora.layer import AdapterLayers
from lorank.scoring.ablation_variants import Gates, Term
from lorank.scoring.microbatch import count_samples, repeat_batch
from lorank.scoring.prefix_cache.block_skipping import BlockSkipper, Prefix
from lorank.scoring.prefix_cache.block_tracing import Trace
from lorank.scoring.prefix_cache.layer_cache import LayerCache
from lorank.scoring.targets import Form, Head, Targets


@dataclass(frozen=True)
class ModelFit:
    """How to run a model, for all parts of the batch.

    Attributes:
        model: the model.
        head: computes the logits of labelled positions.
        trace: the blocks of the model.
        form: the form of its loss.
        max_copies: from the number of samples of a part and its targets to the number of variants per forward pass.
    """

    model: nn.Module
    head: Head
    trace: Trace
    form: Form
    max_copies: Callable[[int, Targets], int]


class VariantRunner:
    """Runs all variants on one part of the batch.

    Args:
        inert: per layer, the ranks without effect, which need no forward pass.
    """

    def __init__(
        self,
        fit: ModelFit,
        layers: AdapterLayers,
        gates: Gates,
        part: Mapping[str, Any],
        inert: Mapping[str, list[int]],
    ) -> None:
        self.fit, self.layers, self.gates, self.inert = fit, layers, gates, inert
        self.skipper = BlockSkipper(fit.trace)
        self.rows = count_samples(part)
        self.targets = Targets.of(fit.form, part["labels"])
        self.max_copies = fit.max_copies(self.rows, self.targets) if self.targets.count else 1
        self._part = part
        self._repeated: dict[int, dict[str, Any]] = {}
        self._prefix: dict[Term, Prefix] = {"without": Prefix(), "alone": Prefix()}
        self._next_prefix: dict[Term, Prefix] = {}
        self._layer_cache = LayerCache(layers, fit.trace.per_sample)
        self._recorded: tuple[Term, int] | None = None

    @contextmanager
    def patched(self) -> Iterator[None]:
        """Inside, blocks and layers can be skipped."""
        with self.skipper.patched(), self._layer_cache.patched():
            yield

    def _arguments(self, copies: int) -> dict[str, Any]:
        if copies not in self._repeated:
            self._repeated = {copies: self.fit.head.arguments(repeat_batch(self._part, copies))}
        return self._repeated[copies]

    def _advance(self, term: Term, to: int) -> Prefix:
        """The prefix of ``to`` blocks under the current gates."""
        prefix = self._prefix[term]
        ahead = self._next_prefix.get(term, prefix)
        if prefix.done < ahead.done <= to:
            prefix = ahead
        arguments = self._arguments(1) if to > prefix.done else {}
        prefix = self.skipper.advance(lambda: self.fit.model(**arguments), prefix, to)
        self._prefix[term] = prefix
        return prefix

    def _record(self, term: Term, prefix: Prefix) -> None:
        """Records the layers of the block after the prefix, and stores the prefix that includes this block."""
        if self._recorded == (term, prefix.done):
            return
        self._recorded = (term, prefix.done)
        if prefix.done == len(self.fit.trace.blocks):
            self._layer_cache.forget()
            return
        arguments = self._arguments(1)
        with self._layer_cache.recording():
            self._next_prefix[term] = self.skipper.advance(lambda: self.fit.model(**arguments), prefix, prefix.done + 1)

    def losses(self, name: str, variants: Tensor, term: Term) -> Tensor:
        """The cross-entropy of variants of layer ``name``, summed over the labels, (v,) float64 on the CPU.

        Args:
            variants: the layer's gates, (v, r). All other layers have the gates of the background.
        """
        prefix = self._advance(term, self.fit.trace.start[name])
        self._record(term, prefix)
        limit = self.max_copies if name in self.fit.trace.per_sample else 1
        losses = []
        for chunk in torch.split(variants, _chunk_size(len(variants), limit)):
            copies = len(chunk)
            # (copies, r) → (copies · n, r): a gate per sample
            self.layers[name].gate = chunk[0] if copies == 1 else chunk.repeat_interleave(self.rows, dim=0)
            with self._layer_cache.ablating(name, copies):
                losses.append(self._run(prefix, copies))
        self.gates.restore(name, term)
        return torch.cat(losses).cpu()

    def _run(self, prefix: Prefix, copies: int) -> Tensor:
        arguments = self._arguments(copies)
        return self.skipper.run(lambda: self.fit.head.losses(arguments, self.targets, copies), prefix, copies)

    def run(
        self, term: Term, wanted: Mapping[str, Sequence[int]], report: Callable[[int], None]
    ) -> Iterator[tuple[str, list[int], Tensor]]:
        """Runs the wanted variants of one term that need a forward pass.

        Args:
            wanted: per layer, the indices of the ranks.
            report: called with the number of variants that were evaluated since the last call.

        Yields:
            A layer's name, the ranks that were run, and the summed cross-entropy of their variants, (ranks,).
        """
        self.gates.background(term)
        for name in sorted(wanted, key=lambda name: self.fit.trace.start[name]):
            ranks = [k for k in wanted[name] if k not in self.inert[name]]
            if ranks and self.targets.count:
                yield name, ranks, self.losses(name, self.gates.variants(name, term)[ranks], term)
            report(len(ranks))

    def background(self, term: Term, report: Callable[[int], None]) -> float:
        """The cross-entropy of M (``without``) or of the base model (``alone``), summed over the labels."""
        self.gates.background(term)
        loss = float(self._run(self._prefix[term], 1)) if self.targets.count else 0.0
        report(1)
        return loss


def _chunk_size(count: int, limit: int) -> int:
    """The size of chunks of at most ``limit``: as few chunks as possible, of even size. 5 with limit 4 gives 3 + 2."""
    return -(-count // -(-count // limit))
