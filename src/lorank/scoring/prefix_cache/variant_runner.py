"""All variants on one part of the batch, block by block: what the exact engine runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lorank.lora.layer import AdapterLayers
from lorank.scoring.loss import forward_arguments
from lorank.scoring.microbatch import inputs_of, repeated, rows_of
from lorank.scoring.prefix_cache.block_skipping import Prefix, Skipper
from lorank.scoring.prefix_cache.block_tracing import Trace
from lorank.scoring.prefix_cache.layer_cache import LayerCache
from lorank.scoring.targets import Form, Head, Targets
from lorank.scoring.variants import Gates, Term


@dataclass(frozen=True)
class ModelFit:
    """What holds for all parts of the batch.

    Attributes:
        max_copies: from the samples of a part and its targets to how many variants share a forward.
    """

    model: nn.Module
    head: Head
    trace: Trace
    form: Form
    max_copies: Callable[[int, Targets], int]


class VariantRunner:
    """All variants on one part of the batch.

    Args:
        dead: per layer, the ranks that need no forward.
    """

    def __init__(
        self, fit: ModelFit, layers: AdapterLayers, gates: Gates, part: Mapping[str, Any], dead: Mapping[str, list[int]]
    ) -> None:
        self.fit, self.layers, self.gates, self.dead = fit, layers, gates, dead
        self.skipper = Skipper(fit.trace)
        self.rows = rows_of(part)
        self.targets = Targets.of(fit.form, part["labels"])
        self.max_copies = fit.max_copies(self.rows, self.targets) if self.targets.count else 1
        self._part = inputs_of(fit.model, part)
        self._fixed = forward_arguments(fit.model)
        self._repeated: dict[int, dict[str, Any]] = {}
        self._prefix: dict[Term, Prefix] = {"without": Prefix(), "alone": Prefix()}
        self._ahead: dict[Term, Prefix] = {}
        self._layer_cache = LayerCache(layers, fit.trace.per_sample)
        self._recorded: tuple[Term, int] | None = None

    @contextmanager
    def patched(self) -> Iterator[None]:
        """Blocks and layers may be skipped inside."""
        with self.skipper.patched(), self._layer_cache.patched():
            yield

    def _arguments(self, copies: int) -> dict[str, Any]:
        if copies not in self._repeated:
            self._repeated = {copies: {**self._fixed, **repeated(self._part, copies)}}
        return self._repeated[copies]

    def _advance(self, term: Term, to: int) -> Prefix:
        """The prefix of ``to`` blocks under the gates now set."""
        prefix = self._prefix[term]
        ahead = self._ahead.get(term, prefix)
        if prefix.done < ahead.done <= to:
            prefix = ahead
        arguments = self._arguments(1) if to > prefix.done else {}
        prefix = self.skipper.advance(lambda: self.fit.model(**arguments), prefix, to)
        self._prefix[term] = prefix
        return prefix

    def _record(self, term: Term, prefix: Prefix) -> None:
        """Remembers what the layers of the block after the prefix give, and that the prefix of one more is known."""
        if self._recorded == (term, prefix.done):
            return
        self._recorded = (term, prefix.done)
        if prefix.done == len(self.fit.trace.blocks):
            self._layer_cache.forget()
            return
        arguments = self._arguments(1)
        with self._layer_cache.recording():
            self._ahead[term] = self.skipper.advance(lambda: self.fit.model(**arguments), prefix, prefix.done + 1)

    def losses(self, name: str, variants: Tensor, term: Term) -> Tensor:
        """Cross-entropy, summed over the labels, of variants of one layer; (v,) float64 on the CPU.

        Args:
            variants: the layer's gates, (v, r). The gates of all other layers are those of the background.
        """
        prefix = self._advance(term, self.fit.trace.start[name])
        self._record(term, prefix)
        limit = self.max_copies if name in self.fit.trace.per_sample else 1
        losses = []
        for chunk in torch.split(variants, _even(len(variants), limit)):
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
        """Runs the wanted variants of one term that a forward is needed for.

        Args:
            wanted: per layer, of which ranks.

        Yields:
            A layer's name, the ranks that were run, and the summed cross-entropy of their variants, (ranks,).
        """
        self.gates.background(term)
        for name in sorted(wanted, key=lambda name: self.fit.trace.start[name]):
            ranks = [k for k in wanted[name] if k not in self.dead[name]]
            if ranks and self.targets.count:
                yield name, ranks, self.losses(name, self.gates.variants(name, term)[ranks], term)
            report(len(ranks))

    def background(self, term: Term, report: Callable[[int], None]) -> float:
        """Summed cross-entropy of M (``without``) or of the base (``alone``)."""
        self.gates.background(term)
        loss = float(self._run(self._prefix[term], 1)) if self.targets.count else 0.0
        report(1)
        return loss


def _even(count: int, limit: int) -> int:
    """The size of chunks that are as few as ``limit`` allows, and as even: 5 in chunks of at most 4 are 3 + 2."""
    return -(-count // -(-count // limit))
