"""Plans for layers from the ranks of groups, and the last rounding, which respects a budget."""

from __future__ import annotations

import torch
from torch import Tensor

from lorank.allocators.ard.groups import group_sizes
from lorank.allocators.ard.masks import layout
from lorank.allocators.resolved_budget import ResolvedBudget
from lorank.lora import AdapterLayers, Plan, plan_for_heads, plan_for_rank


def plan_for_groups(layers: AdapterLayers, wanted: Tensor) -> Plan:
    """The plan that gives every group ``wanted`` ranks, (G,): the first ranks are kept, new ranks are appended.

    It contains only the layers that change.
    """
    plan = {}
    by_layer = torch.split(wanted.cpu(), list(group_sizes(layers).values()))
    for (name, layer), ranks in zip(layers.items(), by_layer, strict=True):
        now, then = layer.head_ranks, tuple(ranks.tolist())
        if now != then:
            plan[name] = plan_for_rank(now[0], then[0]) if layer.groups is None else plan_for_heads(now, then)
    return plan


def at_least_one(ranks: Tensor, effective: Tensor) -> Tensor:
    """``ranks``; if all are 0, the group with the highest r0·α gets one rank, because an adapter file needs one."""
    if not ranks.any():
        ranks = ranks.clone()
        ranks[effective.argmax()] = 1
    return ranks


def clip_to_budget(
    budget: ResolvedBudget, layers: AdapterLayers, ranks: Tensor, effective: Tensor, min_rank: int
) -> Tensor:
    """``ranks`` if they fit the budget, else the best of them that fit: by r0·α − i, highest first.

    A rank's score falls with its position in its group, and all ranks of a module cost the same. Therefore a group
    keeps its first ranks, and at least ``min_rank`` of them.

    Args:
        ranks: the stored ranks of every group, (G,).
        effective: r0·α of every group, (G,).
        min_rank: the lowest rank of a group, ≥ 0.

    Returns:
        The ranks of every group, (G,).
    """
    sizes = group_sizes(layers)
    totals = [int(some.sum()) for some in torch.split(ranks, list(sizes.values()))]
    if budget.fits(dict(zip(sizes, totals, strict=True))):
        return ranks
    member, position = layout(ranks)
    scores = (effective[member] - position).masked_fill(position < min_rank, torch.inf)  # (R,)
    by_layer = dict(zip(sizes, torch.split(scores, totals), strict=True))
    owners = dict(zip(sizes, torch.split(member, totals), strict=True))
    kept = budget.keep_best(by_layer)
    staying = torch.cat(
        [owners[name][list(indices)] for name, indices in kept.items()]
    )  # the groups of the ranks to keep
    return torch.bincount(staying, minlength=len(ranks))
