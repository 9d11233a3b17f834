"""What methods that start above their budget and prune down to it share: AdaLoRA and SoRA."""

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
    """What must hold at the end.

    Args:
        budget: None: half of the ranks that the adapter was made with, at least one for each module that cannot be
            without. A cap on the rank of a module by itself leaves the number of ranks as it was made.

    Raises:
        BudgetError: it does not fit the modules.
    """
    initial = sum((run.initial_ranks or layers.ranks).values())
    needed = max(1, sum(layer.min_rank for layer in layers.values()))
    if budget is None:
        return Budget(ranks=max(needed, initial // 2)).resolve(layers)
    wanted = Budget.parse(budget)
    cap = wanted.max_lora_rank
    if cap is not None and len(wanted.named) == 1:
        # Not the ranks that are there now: some have gone, and a resumed run must find what the first one found.
        room = sum(min(layer.max_rank, cap) for layer in layers.values())
        wanted = replace(wanted, ranks=min(initial, room))
    return wanted.resolve(layers)


def warn_if_nothing_to_prune(method: str, limits: ResolvedBudget, run: TrainingInfo) -> None:
    """A run that starts within its budget prunes nothing, which is hardly what was meant."""
    if limits.fits(run.initial_ranks):
        logger.warning(
            "%s prunes down to its budget, and the %d ranks that the adapter was made with are within it: no rank will "
            "go. Raise the rank in LoraConfig(r=…), to twice the budget for example, or name a smaller budget",
            method,
            sum(run.initial_ranks.values()),
        )


def plan_to_keep(kept: Mapping[str, Sequence[int]], ranks: Mapping[str, int]) -> Plan:
    """The plan that leaves these ranks.

    Args:
        kept: per layer, the indices of the ranks that stay, ascending.
        ranks: per layer, how many there are.
    """
    return {name: LayerPlan(tuple(kept[name])) for name, rank in ranks.items() if len(kept[name]) < rank}
