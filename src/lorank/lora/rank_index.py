"""Whatever is kept per rank outside a layer (scores, moments of a gate) follows a resize."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lorank.lora.plan import LayerPlan, Plan


def rank_origins(plan: Plan, ranks: Mapping[str, int]) -> Tensor:
    """Where each rank comes from when a plan is carried out, for whoever keeps something per rank.

    Args:
        ranks: the rank of each layer before.

    Returns:
        (R after,) int64, all layers in order: the rank's index among all ranks before, or −1 where it is new.
    """
    origins: list[int] = []
    first = 0
    for name, rank in ranks.items():
        change = plan.get(name, LayerPlan(tuple(range(rank))))
        origins += [-1 if kept < 0 else first + kept for kept in change.origins]
        first += rank
    return torch.tensor(origins, dtype=torch.long)


def reindex_ranks(values: Tensor, origins: Tensor, axis: int = 0) -> Tensor:
    """A copy of something kept per rank, after a resize: kept ranks keep theirs, new ones have zeros.

    Args:
        values: the axis named ``axis`` counts the ranks before.
        origins: (ranks after,) int64, where each one was before, or −1 (:func:`lorank.lora.rank_origins`).
    """
    origins = origins.to(values.device)
    moved = values.new_zeros([*values.shape[:axis], len(origins), *values.shape[axis + 1 :]])
    old = (origins >= 0).nonzero().squeeze(1)
    return moved.index_copy(axis, old, values.index_select(axis, origins[old]))
