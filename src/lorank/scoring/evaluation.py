"""Exact losses of chosen variants: by the engine that was asked for, over all processes that share the work."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from typing import Any, Literal

from torch import nn

from lorank.lora.layer import AdapterLayers
from lorank.scoring.loss import LossFn, base_of, require_finite
from lorank.scoring.prefix_cache.engine import ExactEngine
from lorank.scoring.reference import ReferenceEngine
from lorank.scoring.variants import (
    Engine,
    Gates,
    Progress,
    Term,
    Unsuited,
    VariantLosses,
    Wanted,
    describe,
    describe_background,
    flattened,
    grouped,
    nothing_known,
)
from lorank.scoring.work_sharding import Share, deal_out, exchange, in_dealt_order, largest_share

logger = logging.getLogger("lorank")
EngineName = Literal["exact", "reference"]


class Evaluator:
    """Evaluates variants. Used inside :func:`~lorank.scoring.preserve_state.preserve_state`.

    Args:
        batch: on the model's device.
        engine: ``exact``; the reference takes over where that does not fit. Or ``reference``.
        share: this process's share of the work; None: all of it.
        progress: called with this process's (variants done, variants in all as far as they are known).

    Attributes:
        engine: the one that is used, after the first call.
        notice: why it is not the one that was asked for, else None.
        evaluations: how many variants were evaluated, by all processes.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: AdapterLayers,
        batch: Mapping[str, Any],
        *,
        engine: EngineName,
        loss_fn: LossFn | None,
        max_rows: int | None,
        share: Share | None,
        progress: Progress | None,
    ) -> None:
        self.engine: EngineName = engine
        self.notice: str | None = None
        self.evaluations = 0
        self._model, self._layers, self._batch = model, layers, batch
        self._loss_fn, self._max_rows, self._share = loss_fn, max_rows, share
        self._progress = progress or (lambda done, total: None)
        self._done, self._total = 0, 0
        self._made: Engine | None = None
        self._gates = Gates(layers)

    def __call__(self, wanted: Wanted, backgrounds: Collection[Term]) -> VariantLosses:
        """The losses of the wanted variants, and of M (``without``) or the base (``alone``) if among ``backgrounds``.

        Raises:
            ValidationBatchError: one of them, which is named, is not finite.
        """
        variants = flattened(wanted)
        own = deal_out(variants, self._share)

        def row() -> list[float]:
            losses = self._evaluate(grouped(own), backgrounds)
            backs = [0.0 if loss is None else loss for loss in (losses.full, losses.base)]
            return [losses.evaluations, *backs, *(float(losses.variants[t][n][k]) for t, n, k in own)]

        rows = exchange(row, 3 + largest_share(len(variants), self._share), self._share)  # (processes, 3 + largest)
        evaluations = int(rows[:, 0].sum())
        self.evaluations += evaluations
        found: dict[Term, float] = {"without": float(rows[0, 1]), "alone": float(rows[0, 2])}
        for term in sorted(backgrounds, reverse=True):  # "without" first
            require_finite(found[term], describe_background(term))
        losses = nothing_known(self._layers, wanted)
        for (term, name, k), loss in zip(variants, in_dealt_order(rows[:, 3:], len(variants)).tolist(), strict=True):
            losses[term][name][k] = require_finite(loss, describe(name, k, term))
        full, base = (found[t] if t in backgrounds else None for t in ("without", "alone"))
        return VariantLosses(full, base, losses, evaluations)

    def _evaluate(self, wanted: Wanted, backgrounds: Collection[Term]) -> VariantLosses:
        if self.engine == "exact":
            try:
                if self._loss_fn is not None:
                    raise Unsuited("loss_fn may do anything with the model")
                if self._made is None:
                    self._made = ExactEngine(self._model, self._layers, self._batch, self._max_rows)
                return self._run(self._made, wanted, backgrounds)
            except Unsuited as reason:
                self.notice = (
                    "ablation runs one whole forward per variant: the exact engine does not fit "
                    f"{type(base_of(self._model)).__name__}, because {reason}"
                )
                logger.warning(self.notice)
                self.engine, self._made = "reference", None
                self._gates.background("without")  # the engine may have stopped in the middle of a variant
        if self._made is None:
            self._made = ReferenceEngine(self._model, self._layers, self._batch, self._loss_fn)
        return self._run(self._made, wanted, backgrounds)

    def _run(self, engine: Engine, wanted: Wanted, backgrounds: Collection[Term]) -> VariantLosses:
        before = self._done
        self._total = before + engine.count(wanted, backgrounds)

        def report(variants: int) -> None:
            self._done += variants
            self._progress(self._done, self._total)

        try:
            return engine.losses(wanted, backgrounds, report)
        except Unsuited:
            self._done = before
            raise
