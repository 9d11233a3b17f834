"""First-order estimates of ablation: two backward passes score every rank.

With a mask m on the ranks (:mod:`lorank.scoring.taylor`),

    L(M without r)  ≈  L(M)    − ∂L/∂m_r at m = 1
    L(r alone)      ≈  L(base) + ∂L/∂m_r at m = 0

and the scores follow from these losses as they do from exact ones (:mod:`lorank.scoring.ablation`). The cost does not
depend on the number of ranks, so a batch of hundreds of samples is affordable: what an estimate loses in exactness it
may win back by less noise.
"""

from __future__ import annotations

import time
from collections.abc import Mapping

from torch import Tensor, nn

from lorank.lora.layer import AdapterLayers
from lorank.scoring.ablation import AblationResult, check_terms, scores_of
from lorank.scoring.loss import LossFn, prepare_batch, unwrap_model
from lorank.scoring.preserve_state import preserve_state
from lorank.scoring.taylor import GatePath
from lorank.scoring.variants import TERMS, Progress, Term, Terms, VariantLosses
from lorank.scoring.work_sharding import Share


def first_order_scores(
    model: nn.Module,
    layers: AdapterLayers,
    batch: Mapping[str, Tensor],
    *,
    terms: Terms = "both",
    loss_fn: LossFn | None = None,
    max_rows: int | None = None,
    progress: Progress | None = None,
    share: Share | None = None,
) -> AblationResult:
    """Estimates the scores of :func:`~lorank.scoring.ablation_scores` from gradients of the gates.

    The model is scored as it is used: in evaluation mode, under the autocast that is on. Everything is restored.

    Args:
        model, layers, batch, terms: as in :func:`~lorank.scoring.ablation_scores`.
        loss_fn: ``loss_fn(model, batch)`` → a scalar with a graph, in place of ``model(**batch).loss``; the batch then
            runs in one pass.
        max_rows: at most so many samples in one pass. Default: up to 2,048 tokens.
        progress: called with (passes over the batch done, in all).
        share: this process's share of the samples; None: all.

    Raises:
        ValidationBatchError: the batch cannot be scored on, or a loss is not finite.
        AdapterError: a layer has a gate per sample.
        ValueError: an unknown ``terms``, or ``max_rows`` below 1.
    """
    check_terms(terms, max_rows)
    start = time.perf_counter()
    model = unwrap_model(model)
    inputs = prepare_batch(model, batch, needs_labels=loss_fn is None)
    with preserve_state(model, layers):
        path = GatePath(model, layers, inputs, loss_fn=loss_fn, max_rows=max_rows, share=share)
        losses = first_order_losses(path, TERMS[terms], progress)
    assert losses.full is not None
    return AblationResult(
        scores=scores_of(losses, layers, terms),
        baseline=losses.full,
        evaluations=0,
        engine="gradients",
        notice=path.notice,
        seconds=time.perf_counter() - start,
        backward_passes=path.passes,
    )


def first_order_losses(path: GatePath, terms: tuple[Term, ...], progress: Progress | None) -> VariantLosses:
    """The losses of all variants of these terms, to first order; L(M) in any case."""
    points: dict[Term, float] = {"without": 1.0, **({"alone": 0.0} if "alone" in terms else {})}
    losses: dict[Term, float] = {}
    variants: dict[Term, dict[str, Tensor]] = {}
    for done, (term, t) in enumerate(points.items(), 1):
        found = path.at(t)
        losses[term] = found.loss
        sign = -1 if term == "without" else 1  # a rank is taken away, or added
        variants[term] = {name: found.loss + sign * gradient for name, gradient in found.gradient.items()}  # (r,)
        if progress is not None:
            progress(done, len(points))
    return VariantLosses(losses["without"], losses.get("alone"), variants, 0)
