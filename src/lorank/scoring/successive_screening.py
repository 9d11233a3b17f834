"""Successive screening: exact scores for the ranks that may be pruned, estimates for the others.

The pruned ranks are those that exact scores would prune. Two backward passes estimate every score
(:mod:`lorank.scoring.taylor`). Then ranks are ablated in the order of their estimates, lowest first: a quarter of all
ranks, then a sixteenth at a time. Each ablation shows the error of an estimate. The scores of the remaining ranks are
assumed to be lower than their estimates by at most twice the largest error so far. Screening ends when these lower
bounds would prune none of the remaining ranks.

This is an assumption, not a proof: the errors of the remaining ranks are unknown. ``docs/scoring.md`` reports how often
it held.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from lorank.lora.layer import AdapterLayers
from lorank.scoring.ablation import AblationResult, check_terms, scores_of
from lorank.scoring.ablation_variants import (
    TERMS,
    Progress,
    Term,
    Terms,
    VariantLosses,
    VariantSelection,
    group_variants,
    unknown_losses,
)
from lorank.scoring.evaluation import EngineName, Evaluator
from lorank.scoring.loss import LossFn, prepare_batch, unwrap_model
from lorank.scoring.preserve_state import preserve_state
from lorank.scoring.scorer import Choose, Rank
from lorank.scoring.taylor import GatePath, first_order_losses
from lorank.scoring.work_sharding import Share

FIRST_FRACTION = 1 / 4
"""The fraction of all ranks that is evaluated before the lower bounds are used for the first time."""
NEXT_FRACTION = 1 / 16
ERROR_FACTOR = 2.0
"""The assumed limit of an estimate's error, as a multiple of the largest error so far."""


def screened_scores(
    model: nn.Module,
    layers: AdapterLayers,
    batch: Mapping[str, Tensor],
    choose: Choose,
    *,
    terms: Terms = "both",
    engine: EngineName = "exact",
    loss_fn: LossFn | None = None,
    max_rows: int | None = None,
    progress: Progress | None = None,
    share: Share | None = None,
) -> AblationResult:
    """Scores that prune the same ranks as the scores of :func:`~lorank.scoring.ablation_scores`.

    The scores are exact for the ranks that were evaluated, and estimates for the others.

    Args:
        model, layers, batch, terms, engine, loss_fn, max_rows, share: as for :func:`~lorank.scoring.ablation_scores`.
        choose: returns the ranks that given scores prune, in a round of a method or under a budget.
        progress: called with (variants done, variants in all as far as known) of this process.

    Raises:
        ValidationBatchError: ranks cannot be scored on the batch, or a loss is NaN or infinite.
        AdapterError: a layer has a gate per sample.
        ValueError: an unknown ``terms``, or ``max_rows`` below 1.
    """
    check_terms(terms, max_rows)
    start = time.perf_counter()
    model = unwrap_model(model)
    inputs = prepare_batch(model, batch, needs_labels=loss_fn is None)
    with preserve_state(model, layers):
        path = GatePath(model, layers, inputs, loss_fn=loss_fn, max_rows=max_rows, share=share)
        estimates = scores_of(first_order_losses(path, TERMS[terms], None), layers, terms)
        evaluate = Evaluator(
            model, layers, inputs, engine=engine, loss_fn=loss_fn, max_rows=max_rows, share=share, progress=progress
        )
        scores, baseline = _screen(layers, estimates, choose, evaluate, terms)
    return AblationResult(
        scores=scores,
        baseline=baseline,
        evaluations=evaluate.evaluations,
        engine=evaluate.engine,
        notice=evaluate.notice or path.notice,
        seconds=time.perf_counter() - start,
        backward_passes=path.passes,
    )


def _screen(
    layers: AdapterLayers, estimates: Mapping[str, Tensor], choose: Choose, evaluate: Evaluator, terms: Terms
) -> tuple[dict[str, Tensor], float]:
    """The scores, and L(M)."""
    losses = VariantLosses(None, None, unknown_losses(layers, TERMS[terms]), 0)
    waiting = _lowest_first(estimates)
    first, following = (max(1, round(share * len(waiting))) for share in (FIRST_FRACTION, NEXT_FRACTION))
    evaluated: set[Rank] = set()
    take = first
    while True:
        batch, waiting = waiting[:take], waiting[take:]
        evaluated.update(batch)
        backgrounds: tuple[Term, ...] = ()
        if losses.full is None:
            backgrounds = ("without", "alone") if terms == "alone" else ("without",)
        losses = _merged(losses, evaluate(_variants(batch, layers, terms), backgrounds))
        exact = scores_of(losses, layers, terms)  # NaN where not evaluated
        bounds = _lower_bounds(estimates, exact)
        if not waiting or evaluated.issuperset(choose(bounds)):
            break
        take = following
    assert losses.full is not None
    scores = {name: torch.where(values.isnan(), estimates[name], values) for name, values in exact.items()}
    return scores, losses.full


def _lowest_first(estimates: Mapping[str, Tensor]) -> list[Rank]:
    """All ranks, lowest estimate first; ties by layer, then rank. A rank whose estimate is NaN comes first."""
    owners = [(name, k) for name, values in estimates.items() for k in range(len(values))]
    flat = torch.cat([*estimates.values()]).nan_to_num(nan=-torch.inf)  # (R,)
    return [owners[i] for i in torch.sort(flat, stable=True).indices.tolist()]


def _variants(ranks: Collection[Rank], layers: AdapterLayers, terms: Terms) -> VariantSelection:
    """The variants of ``ranks``, layer by layer in the model's order, ranks ascending."""
    place = {name: i for i, name in enumerate(layers)}
    ordered = sorted(ranks, key=lambda rank: (place[rank[0]], rank[1]))
    return group_variants([(term, name, k) for term in TERMS[terms] for name, k in ordered])


def _merged(known: VariantLosses, new: VariantLosses) -> VariantLosses:
    variants = {
        term: {
            name: torch.where(values.isnan(), new.variants[term][name], values) if term in new.variants else values
            for name, values in of_term.items()
        }
        for term, of_term in known.variants.items()
    }
    full = known.full if new.full is None else new.full
    base = known.base if new.base is None else new.base
    return VariantLosses(full, base, variants, known.evaluations + new.evaluations)


def _lower_bounds(estimates: Mapping[str, Tensor], exact: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The exact score if known, else the estimate minus the limit of its error."""
    errors = torch.cat([(exact[name] - values).abs() for name, values in estimates.items()])  # (R,)
    errors = errors[errors.isfinite()]
    reach = ERROR_FACTOR * float(errors.max()) if len(errors) else torch.inf
    bounds = {}
    for name, values in estimates.items():
        lower = (values - reach).nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
        bounds[name] = torch.where(exact[name].isnan(), lower, exact[name])
    return bounds
