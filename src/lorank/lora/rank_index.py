"""Reindexes tensors with one entry per rank (scores, moments of gates) after a resize."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lorank.lora.resize_plan import LayerPlan, Plan


def rank_origins(plan: Plan, ranks: Mapping[str, int]) -> Tensor:
    """The old index of each rank of all layers when a plan is carried out.

    Args:
        plan: the change of ranks.
        ranks: the rank of each layer before the change.

    Returns:
        (R after,) int64, all layers in order: the index among all ranks before the change, or −1 for a new rank.
    """
    origins: list[int] = []
    first = 0
    for name, rank in ranks.items():
        change = plan.get(name, LayerPlan(tuple(range(rank))))
        origins += [-1 if kept < 0 else first + kept for kept in change.origins]
        first += rank
    return torch.tensor(origins, dtype=torch.long)


def reindex_ranks(values: Tensor, origins: Tensor, axis: int = 0) -> Tensor:
    """A copy of ``values`` for the ranks after a resize: kept ranks keep their values, new ranks get zeros.

    Args:
        values: of any shape; its axis ``axis`` has one entry per rank before the resize.
        origins: (ranks after,) int64, the old index of each rank, or −1 for a new rank
            (:func:`lorank.lora.rank_origins`).
        axis: the rank axis of ``values``.
    """
    origins = origins.to(values.device)
    moved = values.new_zeros([*values.shape[:axis], len(origins), *values.shape[axis + 1 :]])
    old = (origins >= 0).nonzero().squeeze(1)
    return moved.index_copy(axis, old, values.index_select(axis, origins[old]))
