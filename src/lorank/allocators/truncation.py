"""Balanced truncation of a trained adapter, without training.

Every module is turned to its balanced basis, in which taking rank i away costs about ½ σ_i² of loss, and the ranks with
the largest σ_i² per trained number stay (:mod:`lorank.scoring.balanced`).

σ² is a second-order prediction at the weights where it is measured. A deep cut leads far away from them. Two things
help, and docs/posthoc.md has what each is worth: Gramians are also measured with half of the update
(:mod:`lorank.scoring.balanced_scores`), and the cut is done in stages, at equal ratios of size, with Gramians measured
anew before each:

    size after stage i of n  =  present^(1 − i/n) · budget^(i/n)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from lorank.allocators.resolved_budget import ResolvedBudget
from lorank.errors import BudgetError
from lorank.lora import AdapterLayers, LayerPlan, resize_
from lorank.scoring import Balanced, balanced_scores
from lorank.scoring.balanced_scores import PATH
from lorank.scoring.loss import LossFn

STAGES = 2


@dataclass(frozen=True)
class Stage:
    """One stage of a truncation.

    Attributes:
        ranks: per module, the rank after it.
        predicted: the predicted increase of the loss, ½ Σ σ² of the ranks that went. ≥ 0.
    """

    ranks: Mapping[str, int]
    predicted: float


def truncate_(
    model: nn.Module,
    layers: AdapterLayers,
    batches: Sequence[Mapping[str, Any]],
    budget: ResolvedBudget,
    *,
    stages: int = STAGES,
    path: Sequence[float] = PATH,
    first: Mapping[str, Balanced] | None = None,
    loss_fn: LossFn | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Stage]:
    """Cuts an adapter to a budget, in stages.

    Args:
        model: the model that the layers belong to.
        layers: its LoRA layers. They are changed in place. No optimiser may hold them: its moments would be of other
            ranks.
        batches: one or more batches with ``labels``, read once per stage. Batches of a few rows suffice.
        budget: the budget.
        stages: n, the number of stages. ≥ 1.
        path: see :func:`lorank.scoring.balanced_scores`.
        first: what :func:`lorank.scoring.balanced_scores` gave for the present adapter, so that the first stage need
            not measure it; or None.
        loss_fn: ``loss_fn(model, batch)`` → a scalar with a graph, in place of ``model(**batch).loss``.
        progress: called with (batches done, batches in all); or None.

    Returns:
        The stages that were done; none if the adapter fits the budget already.

    Raises:
        BudgetError: ``stages`` is below 1.
        PlanError: a module has gates or is in per-head form.
        ValidationBatchError: see :func:`lorank.scoring.balanced_scores`. Earlier stages have been done then.
    """
    if stages < 1:
        raise BudgetError(f"stages={stages}: expected at least 1")
    start = layers.ranks
    done: list[Stage] = []
    measured, measurements = 0, stages - (first is not None)
    for stage in range(1, stages + 1):
        step = stage_budget(budget, start, stage / stages)
        if step.fits(layers.ranks):  # the steps are smaller than a rank
            continue
        if first is not None and not done:
            found = first
        else:

            def report(part: int, of: int, before: int = measured) -> None:
                if progress is not None:
                    progress(before * of + part, measurements * of)

            found = balanced_scores(model, layers, batches, path=path, loss_fn=loss_fn, progress=report)
            measured += 1
        kept = step.keep_best(step.per_cost({name: one.worth for name, one in found.items()}))
        plan = {name: LayerPlan(kept[name], basis=one.basis) for name, one in found.items() if layers[name].rank}
        lost = sum(float(one.worth.sum() - one.worth[list(kept[name])].sum()) for name, one in found.items()) / 2
        resize_(layers, plan)
        done.append(Stage(layers.ranks, lost))
    return done


def stage_budget(budget: ResolvedBudget, start: Mapping[str, int], position: float) -> ResolvedBudget:
    """The budget on the way from present ranks to ``budget``: each limit L becomes cost(start)^(1−p) · L^p.

    A limit that ``start`` does not exceed stays as it is, and caps likewise.

    Args:
        budget: the budget at the end of the way.
        start: per module, the rank at its beginning.
        position: p, from 0 (the beginning) to 1 (the budget itself).
    """

    def between(limit: int, present: int) -> int:
        if present <= limit:
            return limit
        return max(limit, int(present * (max(limit, 1) / present) ** position))

    return replace(
        budget,
        constraints=tuple(replace(c, limit=between(c.limit, c.cost(start)), named=None) for c in budget.constraints),
        caps={name: between(cap, start[name]) for name, cap in budget.caps.items()},
    )
