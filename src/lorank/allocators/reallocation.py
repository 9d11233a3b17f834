"""Where ranks go in one round of ALoRA (Liu et al., NAACL 2024, arXiv 2403.16187, 3.3.2).

    prune the n_A ranks with the lowest scores, over all modules
    give n_A new ranks to the modules that lost none, the most important first, in turns

Pure functions of the scores. What a module can hold and cannot do without, and a budget, are kept to.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lorank.allocators.resolved_budget import ResolvedBudget
from lorank.lora import LayerPlan, Plan


def prune_and_reallocate(
    scores: Mapping[str, Tensor],
    count: int,
    capacity: Mapping[str, int],
    retry_empty: bool = False,
    *,
    limits: ResolvedBudget | None = None,
    minima: Mapping[str, int] | None = None,
) -> Plan:
    """One round: prune the ``count`` lowest ranks, give as many to the modules that lost none.

    Args:
        scores: per module (r,), higher = keep; (0,) for a module at rank 0.
        count: n_A, fewer than there are ranks.
        capacity: per module, the most ranks that it can hold.
        retry_empty: whether modules at rank 0 may receive.
        limits: a budget; gifts then go on while it has room for one more, instead of ``count`` of them.
        minima: per module, the ranks that it cannot do without; default: none.

    Returns:
        A plan that names every module that changes.
    """
    names = list(scores)
    kept = {name: set(range(len(scores[name]))) for name in names}
    for name, rank in lowest_ranks(scores, count, minima or {}):
        kept[name].discard(rank)
    lost = {name for name in names if len(kept[name]) < len(scores[name])}
    # Modules by importance: the mean score, ties by order (sorted is stable); empty ones, if allowed, come last.
    unhurt = [name for name in names if name not in lost]
    receivers = sorted((n for n in unhurt if len(scores[n])), key=lambda n: -float(scores[n].double().mean()))
    if retry_empty:
        receivers += [name for name in unhurt if not len(scores[name])]
    gifts = _deal({name: len(ranks) for name, ranks in kept.items()}, receivers, capacity, count, limits)
    return {
        name: LayerPlan(tuple(sorted(kept[name])), gifts.get(name, 0))
        for name in names
        if name in lost or gifts.get(name, 0)
    }


def lowest_ranks(scores: Mapping[str, Tensor], count: int, minima: Mapping[str, int]) -> list[tuple[str, int]]:
    """The ``count`` lowest ranks over all modules, ties by module order, then rank order; minima are left alone."""
    owners = [(name, rank) for name, values in scores.items() for rank in range(len(values))]
    flat = torch.cat([values.double().cpu() for values in scores.values()])  # (R,)
    spare = {name: len(values) - minima.get(name, 0) for name, values in scores.items()}
    lowest: list[tuple[str, int]] = []
    for name, rank in (owners[i] for i in torch.sort(flat, stable=True).indices.tolist()):
        if len(lowest) == count:
            break
        if spare[name] > 0:
            spare[name] -= 1
            lowest.append((name, rank))
    return lowest


def _deal(
    ranks: Mapping[str, int],
    receivers: Sequence[str],
    capacity: Mapping[str, int],
    count: int,
    limits: ResolvedBudget | None,
) -> dict[str, int]:
    """Deals ranks in turns, in the order of ``receivers``: as even as can be, the remainder to the first.

    Without limits ``count`` of them, with limits as many as they have room for. Full modules sit out.
    """
    held = dict(ranks)
    dealt, turn = 0, list(receivers)
    while turn:
        still = []
        for name in turn:
            if (limits is None and dealt == count) or held[name] >= capacity[name]:
                continue
            if limits is not None and not limits.room(held, name):
                continue
            held[name] += 1
            dealt += 1
            still.append(name)
        turn = still
    return {name: held[name] - ranks[name] for name in receivers}
