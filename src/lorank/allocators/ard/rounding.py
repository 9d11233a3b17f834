"""From the ranks that groups should have to plans for layers, and the last rounding, which keeps to a budget."""

from __future__ import annotations

import torch
from torch import Tensor

from lorank.allocators.ard.groups import group_sizes
from lorank.allocators.ard.masks import layout
from lorank.allocators.resolved_budget import ResolvedBudget
from lorank.lora import AdapterLayers, Plan, plan_for_heads, plan_for_rank


def plan_for_groups(layers: AdapterLayers, wanted: Tensor) -> Plan:
    """Takes every group to ``wanted`` ranks, (G,): the first ones stay, new ones follow. Names what changes."""
    plan = {}
    by_layer = torch.split(wanted.cpu(), list(group_sizes(layers).values()))
    for (name, layer), ranks in zip(layers.items(), by_layer, strict=True):
        now, then = layer.head_ranks, tuple(ranks.tolist())
        if now != then:
            plan[name] = plan_for_rank(now[0], then[0]) if layer.groups is None else plan_for_heads(now, then)
    return plan


def at_least_one(ranks: Tensor, effective: Tensor) -> Tensor:
    """``ranks``, or, where not one is left in all groups, one for the group with the highest r0·α: a file needs it."""
    if not ranks.any():
        ranks = ranks.clone()
        ranks[effective.argmax()] = 1
    return ranks


def clip_to_budget(
    limits: ResolvedBudget, layers: AdapterLayers, ranks: Tensor, effective: Tensor, min_rank: int
) -> Tensor:
    """All ``ranks`` where they fit a budget, else the best of them that do: by r0·α − i, highest first.

    A rank's score falls with its position in its group, and all ranks of a module cost the same, so that what a group
    keeps are its first ranks, and at least ``min_rank`` of them.

    Args:
        ranks: those that there are, of every group, (G,).
        effective: r0·α of every group, (G,).
    """
    sizes = group_sizes(layers)
    totals = [int(some.sum()) for some in torch.split(ranks, list(sizes.values()))]
    if limits.fits(dict(zip(sizes, totals, strict=True))):
        return ranks
    member, position = layout(ranks)
    scores = (effective[member] - position).masked_fill(position < min_rank, torch.inf)  # (R,)
    by_layer = dict(zip(sizes, torch.split(scores, totals), strict=True))
    owners = dict(zip(sizes, torch.split(member, totals), strict=True))
    kept = limits.keep_best(by_layer)
    staying = torch.cat([owners[name][list(indices)] for name, indices in kept.items()])  # groups of ranks that stay
    return torch.bincount(staying, minlength=len(ranks))
