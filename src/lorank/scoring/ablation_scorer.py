"""The ablation scorer: AB-LoRA's score of a rank (arXiv 2403.16187), exact, estimated or screened."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

from lorank.errors import ValidationBatchError
from lorank.scoring.ablation import AblationResult, ablation_scores, try_ablation
from lorank.scoring.ablation_variants import Terms
from lorank.scoring.context import Context, State
from lorank.scoring.scorer import Choose, Scorer, Scores
from lorank.scoring.successive_screening import screened_scores
from lorank.scoring.taylor import first_order_scores, try_first_order

AblationMethod: TypeAlias = Literal["first_order", "exact", "screen"]

FIRST_ORDER_SAMPLES = 128
"""|B_val| for ``first_order``. Samples cost little there, and more samples make up for the error of the estimates
(``docs/scoring.md``)."""


@dataclass(frozen=True)
class AblationScorer(Scorer):
    """Scores ranks by IS(r) = S(M) − S(M without r) + S(M with r alone), on one fixed batch. It keeps no state.

    Args:
        method: ``"first_order"`` (:func:`~lorank.scoring.first_order_scores`), ``"exact"``
            (:func:`~lorank.scoring.ablation_scores`) or ``"screen"`` (:func:`~lorank.scoring.screened_scores`).
        terms: which terms of IS count: ``"both"``, ``"without"`` or ``"alone"``.
        samples: number of rows of the batch; None: 32 as in the paper, or 128 for ``first_order``. ≥ 1.
        engine: the engine of exact evaluations, ``"exact"`` or ``"reference"``.

    Raises:
        ValueError: when scoring, if ``method``, ``terms`` or ``engine`` is unknown.
    """

    method: AblationMethod = "first_order"
    terms: Terms = "both"
    samples: int | None = None
    engine: Literal["exact", "reference"] = "exact"

    @property
    def needs_validation_batch(self) -> bool:
        return True

    @property
    def validation_samples(self) -> int:
        if self.samples is not None:
            return self.samples
        return FIRST_ORDER_SAMPLES if self.method == "first_order" else super().validation_samples

    @property
    def own_backward(self) -> bool:
        return self.method != "exact"

    def score(self, context: Context, state: State, choose: Choose) -> Scores:
        result = self._evaluate(context, choose)
        return Scores(
            result.scores,
            {
                "loss": result.baseline,
                "scored_by": self.method,
                "evaluations": result.evaluations,
                "backward_passes": result.backward_passes,
                "engine": result.engine,
                "notice": result.notice,
                "scoring_seconds": result.seconds,
            },
        )

    def try_out(self, context: Context, state: State) -> None:
        """Runs a part of the batch, or all of it if it cannot be split; of exact evaluations, the first variants."""
        model, layers, batch, loss_fn = context.model, context.layers, _batch_of(context), context.loss_fn
        if self.method != "exact":
            try_first_order(model, layers, batch, loss_fn=loss_fn)
        if self.method != "first_order":
            try_ablation(model, layers, batch, terms=self.terms, engine=self.engine, loss_fn=loss_fn)

    def _evaluate(self, context: Context, choose: Choose) -> AblationResult:
        model, layers, batch = context.model, context.layers, _batch_of(context)
        common: dict[str, Any] = {
            "terms": self.terms,
            "loss_fn": context.loss_fn,
            "progress": context.progress,
            "share": context.share,
        }
        if self.method == "first_order":
            return first_order_scores(model, layers, batch, **common)
        if self.method == "screen":
            return screened_scores(model, layers, batch, choose, engine=self.engine, **common)
        if self.method == "exact":
            return ablation_scores(model, layers, batch, engine=self.engine, **common)
        raise ValueError(f"method is {self.method!r}; expected one of {', '.join(get_args(AblationMethod))}")


def _batch_of(context: Context) -> Mapping[str, Any]:
    if context.validation_batch is None:
        raise ValidationBatchError(
            "ablation scores ranks on a fixed batch of validation data: give validation_batch=… (the ALoRA paper "
            "takes 32 samples)"
        )
    return context.validation_batch
