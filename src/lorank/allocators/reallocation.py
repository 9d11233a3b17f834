"""The reallocation of ranks in one round of ALoRA (Liu et al., NAACL 2024, arXiv 2403.16187, 3.3.2).

    prune the n_A ranks with the lowest scores, over all modules
    give n_A new ranks to the modules that lost none, the most important first, in turns

These are pure functions of the scores. They respect the capacity and the minimum rank of each module, and a budget.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lorank.allocators.resolved_budget import ResolvedBudget
from lorank.lora import Basis, LayerPlan, Plan


def prune_and_reallocate(
    scores: Mapping[str, Tensor],
    count: int,
    capacity: Mapping[str, int],
    retry_empty: bool = False,
    *,
    budget: ResolvedBudget | None = None,
    minima: Mapping[str, int] | None = None,
    bases: Mapping[str, Basis] | None = None,
) -> Plan:
    """One round: prunes the ``count`` lowest ranks and gives as many new ranks to the modules that lost none.

    Args:
        scores: per module (r,), higher = keep; (0,) for a module at rank 0.
        count: n_A, less than the total number of ranks.
        capacity: per module, the highest possible rank.
        retry_empty: whether modules at rank 0 may receive new ranks.
        budget: if given, new ranks are added as long as the budget has room, instead of ``count`` of them.
        minima: per module, the lowest allowed rank; None: 0.
        bases: per module, the basis whose ranks the scores belong to; without an entry, the present one. Only modules
            that lose ranks are turned to it.

    Returns:
        A plan with every module that changes.
    """
    names = list(scores)
    kept = {name: set(range(len(scores[name]))) for name in names}
    for name, rank in lowest_ranks(scores, count, minima or {}):
        kept[name].discard(rank)
    lost = {name for name in names if len(kept[name]) < len(scores[name])}
    # Modules by importance: the mean score, ties by order (sorted is stable). Empty modules, if allowed, come last.
    unhurt = [name for name in names if name not in lost]
    receivers = sorted((n for n in unhurt if len(scores[n])), key=lambda n: -float(scores[n].double().mean()))
    if retry_empty:
        receivers += [name for name in unhurt if not len(scores[name])]
    gifts = _deal({name: len(ranks) for name, ranks in kept.items()}, receivers, capacity, count, budget)
    return {
        name: LayerPlan(
            tuple(sorted(kept[name])), gifts.get(name, 0), basis=(bases or {}).get(name) if name in lost else None
        )
        for name in names
        if name in lost or gifts.get(name, 0)
    }


def lowest_ranks(scores: Mapping[str, Tensor], count: int, minima: Mapping[str, int]) -> list[tuple[str, int]]:
    """The ``count`` lowest ranks over all modules, ties by module order, then rank order. Respects ``minima``."""
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
    budget: ResolvedBudget | None,
) -> dict[str, int]:
    """Distributes new ranks over ``receivers``, one each in turn: as evenly as possible, the remainder to the first.

    Without a budget, ``count`` ranks; with a budget, as many as it has room for. A full module receives none.
    """
    held = dict(ranks)
    dealt, turn = 0, list(receivers)
    while turn:
        still = []
        for name in turn:
            if (budget is None and dealt == count) or held[name] >= capacity[name]:
                continue
            if budget is not None and not budget.room(held, name):
                continue
            held[name] += 1
            dealt += 1
            still.append(name)
        turn = still
    return {name: held[name] - ranks[name] for name in receivers}
