"""Exact scores where they decide something, estimates elsewhere: the ranks that go are those of exact scores.

Two backward passes estimate every score (:mod:`lorank.scoring.taylor`). Ablations then follow from the lowest
estimate upwards, the first quarter of all ranks, then a sixteenth at a time. What they have shown about the error of
the estimates is assumed of the ranks that are left: none of those is lower than its estimate by more than twice the
worst error so far. Where even that lower bound would not make one of them go, the set of ranks that go is settled.

An assumption, not a proof: the error of ranks that were never looked at is unknown. How often it held is in
``docs/scoring.md``.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from lorank.lora.layer import AdapterLayers
from lorank.scoring.ablation import AblationResult, check_terms, scores_of
from lorank.scoring.evaluation import EngineName, Evaluator
from lorank.scoring.loss import LossFn, prepare_batch, unwrap_model
from lorank.scoring.preserve_state import preserve_state
from lorank.scoring.scorer import Choose, Rank
from lorank.scoring.taylor import GatePath, first_order_losses
from lorank.scoring.variants import TERMS, Progress, Term, Terms, VariantLosses, Wanted, grouped, nothing_known
from lorank.scoring.work_sharding import Share

FIRST_SHARE = 1 / 4
"""Of all ranks, how many are evaluated before the estimates' error is judged."""
NEXT_SHARE = 1 / 16
REACH = 2.0
"""How many times the worst error so far the next may be."""


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
    """Scores under which the same ranks go as under those of :func:`~lorank.scoring.ablation_scores`.

    Exact for the ranks that were evaluated, estimates for the others.

    Args:
        model, layers, batch, terms, engine, loss_fn, max_rows, share: as for :func:`~lorank.scoring.ablation_scores`.
        choose: which ranks go, of given scores: those of a method's round, or of a budget.
        progress: called with (variants done, variants in all as far as they are known), those of this process.

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
    losses = VariantLosses(None, None, nothing_known(layers, TERMS[terms]), 0)
    waiting = _lowest_first(estimates)
    first, following = (max(1, round(share * len(waiting))) for share in (FIRST_SHARE, NEXT_SHARE))
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
    """All ranks from the lowest estimate upwards; ties by layer, then rank. One that is no number comes first."""
    owners = [(name, k) for name, values in estimates.items() for k in range(len(values))]
    flat = torch.cat([*estimates.values()]).nan_to_num(nan=-torch.inf)  # (R,)
    return [owners[i] for i in torch.sort(flat, stable=True).indices.tolist()]


def _variants(ranks: Collection[Rank], layers: AdapterLayers, terms: Terms) -> Wanted:
    """Their variants, layer by layer in the model's order, ranks ascending."""
    place = {name: i for i, name in enumerate(layers)}
    ordered = sorted(ranks, key=lambda rank: (place[rank[0]], rank[1]))
    return grouped([(term, name, k) for term in TERMS[terms] for name, k in ordered])


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
    """The exact score where there is one, elsewhere the estimate less what it may be wrong by."""
    errors = torch.cat([(exact[name] - values).abs() for name, values in estimates.items()])  # (R,)
    errors = errors[errors.isfinite()]
    reach = REACH * float(errors.max()) if len(errors) else torch.inf
    bounds = {}
    for name, values in estimates.items():
        lower = (values - reach).nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
        bounds[name] = torch.where(exact[name].isnan(), lower, exact[name])
    return bounds
