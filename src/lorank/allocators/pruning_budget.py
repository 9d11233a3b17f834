"""Functions for methods that start above their budget and prune down to it (AdaLoRA and SoRA)."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace

from lorank.allocators.base import TrainingInfo
from lorank.allocators.budget import Budget, BudgetLike
from lorank.allocators.resolved_budget import ResolvedBudget
from lorank.lora import AdapterLayers, LayerPlan, Plan

logger = logging.getLogger("lorank")


def final_budget(budget: BudgetLike, layers: AdapterLayers, run: TrainingInfo) -> ResolvedBudget:
    """The budget that must hold at the end of the run.

    Args:
        budget: None: half of the ranks that the adapter was made with, but at least the minimum ranks of all modules.
            ``max_lora_rank`` as the only limit does not change the number of ranks that the adapter was made with.

    Raises:
        BudgetError: the budget does not fit the modules.
    """
    initial = sum((run.initial_ranks or layers.ranks).values())
    needed = max(1, sum(layer.min_rank for layer in layers.values()))
    if budget is None:
        return Budget(ranks=max(needed, initial // 2)).resolve(layers)
    wanted = Budget.parse(budget)
    cap = wanted.max_lora_rank
    if cap is not None and len(wanted.named) == 1:
        # Computed from the initial ranks, because a resumed run, with fewer ranks, must get the same budget.
        room = sum(min(layer.max_rank, cap) for layer in layers.values())
        wanted = replace(wanted, ranks=min(initial, room))
    return wanted.resolve(layers, run.initial_ranks)


def warn_if_nothing_to_prune(method: str, budget: ResolvedBudget, run: TrainingInfo) -> None:
    """Logs a warning if the run starts within its budget: it would prune nothing, which is probably a mistake."""
    if budget.fits(run.initial_ranks):
        logger.warning(
            "%s prunes down to its budget, but the %d ranks that the adapter was made with are already within it: no "
            "rank will be pruned. Raise the rank in LoraConfig(r=…), for example to twice the budget, or give a "
            "smaller budget",
            method,
            sum(run.initial_ranks.values()),
        )


def plan_to_keep(kept: Mapping[str, Sequence[int]], ranks: Mapping[str, int]) -> Plan:
    """The plan that keeps these ranks and removes the others.

    Args:
        kept: per layer, the indices of the ranks to keep, ascending.
        ranks: per layer, the present number of ranks.
    """
    return {name: LayerPlan(tuple(kept[name])) for name, rank in ranks.items() if len(kept[name]) < rank}
