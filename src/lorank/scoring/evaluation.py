"""Exact losses of selected variants, by the requested engine, over all processes that share the work."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from typing import Any, Literal

import torch
from torch import nn

from lorank.errors import ValidationBatchError
from lorank.lora.layer import AdapterLayers
from lorank.scoring.ablation_variants import (
    Engine,
    Gates,
    IncompatibleError,
    Progress,
    Term,
    VariantLosses,
    VariantSelection,
    describe,
    describe_background,
    flatten_variants,
    group_variants,
    unknown_losses,
)
from lorank.scoring.loss import LossFn, base_of, require_finite
from lorank.scoring.prefix_cache.engine import ExactEngine
from lorank.scoring.reference import ReferenceEngine
from lorank.scoring.work_sharding import Share, exchange, largest_share, own_items, restore_order

logger = logging.getLogger("lorank")
EngineName = Literal["exact", "reference"]


class Evaluator:
    """Evaluates variants. Used inside :func:`~lorank.scoring.preserve_state.preserve_state`.

    Args:
        batch: on the model's device.
        engine: ``exact`` or ``reference``. If the exact engine does not support the model, the reference engine runs.
        share: this process's share of the work; None: all of it.
        progress: called with this process's (variants done, variants in all as far as known).

    Attributes:
        engine: after the first call, the engine that is used.
        notice: why the requested engine is not used, or None.
        evaluations: number of variants that all processes have evaluated.
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

    def __call__(self, wanted: VariantSelection, backgrounds: Collection[Term]) -> VariantLosses:
        """The losses of the wanted variants, and of M (``without``) or the base (``alone``) if among ``backgrounds``.

        Raises:
            ValidationBatchError: a loss is NaN or infinite. The message names the variant.
        """
        variants = flatten_variants(wanted)
        own = own_items(variants, self._share)

        def row() -> list[float]:
            losses = self._evaluate(group_variants(own), backgrounds)
            backs = [0.0 if loss is None else loss for loss in (losses.full, losses.base)]
            return [losses.evaluations, *backs, *(float(losses.variants[t][n][k]) for t, n, k in own)]

        rows = exchange(row, 3 + largest_share(len(variants), self._share), self._share)  # (processes, 3 + largest)
        evaluations = int(rows[:, 0].sum())
        self.evaluations += evaluations
        found: dict[Term, float] = {"without": float(rows[0, 1]), "alone": float(rows[0, 2])}
        for term in sorted(backgrounds, reverse=True):  # "without" first
            require_finite(found[term], describe_background(term))
        losses = unknown_losses(self._layers, wanted)
        for (term, name, k), loss in zip(variants, restore_order(rows[:, 3:], len(variants)).tolist(), strict=True):
            losses[term][name][k] = require_finite(loss, describe(name, k, term))
        full, base = (found[t] if t in backgrounds else None for t in ("without", "alone"))
        return VariantLosses(full, base, losses, evaluations)

    def _evaluate(self, wanted: VariantSelection, backgrounds: Collection[Term]) -> VariantLosses:
        if self.engine == "exact":
            try:
                if self._loss_fn is not None:
                    raise IncompatibleError("loss_fn may use the model in any way")
                if self._made is None:
                    self._made = ExactEngine(self._model, self._layers, self._batch, self._max_rows)
                return self._run(self._made, wanted, backgrounds)
            except IncompatibleError as reason:
                self._step_aside(reason)
            except (ValidationBatchError, torch.OutOfMemoryError):
                raise
            except Exception as error:  # the model may raise anything when it is called in another way
                self._step_aside(IncompatibleError(f"its forward raised {type(error).__name__}: {error}"))
        if self._made is None:
            self._made = ReferenceEngine(self._model, self._layers, self._batch, self._loss_fn)
        return self._run(self._made, wanted, backgrounds)

    def _step_aside(self, reason: IncompatibleError) -> None:
        """Uses the reference engine from now on."""
        self.notice = (
            "ablation runs one whole forward per variant: the exact engine does not fit "
            f"{type(base_of(self._model)).__name__}, because {reason}"
        )
        logger.warning(self.notice)
        self.engine, self._made = "reference", None
        self._gates.background("without")  # the engine may have stopped in the middle of a variant

    def _run(self, engine: Engine, wanted: VariantSelection, backgrounds: Collection[Term]) -> VariantLosses:
        before = self._done
        self._total = before + engine.count(wanted, backgrounds)

        def report(variants: int) -> None:
            self._done += variants
            self._progress(self._done, self._total)

        try:
            return engine.losses(wanted, backgrounds, report)
        except Exception:
            self._done = before
            raise
