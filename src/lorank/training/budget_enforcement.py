"""Prunes loaded weights (e.g. those of the best checkpoint) that exceed the budget."""

from __future__ import annotations

import logging

import torch

from lorank.allocators import Allocation, ResolvedBudget
from lorank.lora import AdapterLayers, LayerPlan, resize_

logger = logging.getLogger("lorank")


def prune_to_budget_(layers: AdapterLayers, limits: ResolvedBudget, optimizer: torch.optim.Optimizer) -> Allocation:
    """Removes the ranks with the smallest updates, ‖A_i‖ ‖B_i‖ s, until the rest fits ``limits``, and logs a warning.

    Args:
        layers: all LoRA layers.
        limits: the budget.
        optimizer: the optimiser that holds the parameters; its state is resized too.

    Returns:
        The allocation that was carried out, with the sizes of the updates as scores.
    """
    before = layers.ranks
    sizes = {
        name: layer.A_matrix.double().norm(dim=1) * layer.B_matrix.double().norm(dim=0) * layer.scaling  # (r,)
        for name, layer in layers.items()
    }
    kept = limits.keep_best(sizes)
    plan = {name: LayerPlan(kept[name]) for name, rank in before.items() if len(kept[name]) < rank}
    resize_(layers, plan, optimizer)
    logger.warning(
        "the weights that were loaded last have %d ranks, more than the budget allows: the ranks with the smallest "
        "updates were removed, and %d are left. Evaluate again, or choose the best among the checkpoints within the "
        "budget",
        sum(before.values()),
        layers.total_rank,
    )
    return Allocation(plan, sizes, {"cut": True})
