"""Changes the ranks of any adapter without data: by the singular values of its updates.

A module's update s · B A is replaced by its best approximation of a lower rank (Eckart–Young), or its ranks are kept
and new ones are added that change nothing (A as PEFT makes it, B = 0).

Without data, all inputs and all outputs of a module count alike, and so do all modules: a unit of ‖s B A‖² is taken to
be worth as much in one module as in any other. This is not so; a module whose inputs are large does more with the same
update. Where there are data, :func:`lorank.allocators.truncate_` (``lorank prune``) measures it.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lorank.allocators.budget import Budget, BudgetLike
from lorank.errors import AdapterError, BudgetError
from lorank.lora import (
    AdapterLayer,
    AdapterLayers,
    LayerPlan,
    check_base_unchanged,
    find_layers,
    plan_for_rank,
    resize_,
)
from lorank.scoring import UpdateSvd

ROUNDING = 1e-12
"""The part of ‖B A‖² that may be missing where ``energy`` asks for all of it."""


def resize_adapter_(
    model: nn.Module,
    *,
    rank: int | None = None,
    budget: BudgetLike = None,
    energy: float | None = None,
    adapter: str | None = None,
    seed: int = 0,
) -> dict[str, int]:
    """Changes the ranks of a trained adapter in place, without data. Exactly one of the three sizes is given.

        lorank.resize_adapter_(model, rank=8)
        model.save_pretrained("rank8")

    A module that shrinks receives the best approximation of its update, with orthogonal rows of A that have the mean
    norm of its former rows. A module that grows keeps its update. The model is plain PEFT before and after. It must not
    be in a run of lorank, and an optimiser must be made afterwards.

    Args:
        model: a model with a LoRA adapter, also DoRA, rsLoRA, embeddings, quantised bases.
        rank: the rank of every module, ≥ 1. Modules below it grow by ranks without effect.
        budget: the size of the whole adapter, smaller than it is (``"50% of adapter"``,
            :class:`~lorank.allocators.budget.Budget`). The largest (s σ)² per trained number stay, over all modules.
        energy: in (0, 1]. Each module receives the lowest rank that holds this share of its ‖B A‖². With 1, nothing
            changes but ranks without effect.
        adapter: name of the adapter; None: the active adapter.
        seed: seed of the rows of A in new ranks.

    Returns:
        The rank of each module.

    Raises:
        BudgetError: not exactly one size is given, or it is out of its range, or the adapter already fits the budget.
        AdapterError: there is no LoRA adapter, its initialisation changed the base weights (PiSSA, …), it is in a run,
            it has no update at all, or a weight is not finite.
        PlanError: a module cannot hold so many ranks.
    """
    layers = find_layers(model, adapter)
    return resize_layers_(layers, rank=rank, budget=budget, energy=energy, seed=seed)


@torch.no_grad()
def resize_layers_(
    layers: AdapterLayers,
    *,
    rank: int | None = None,
    budget: BudgetLike = None,
    energy: float | None = None,
    seed: int = 0,
) -> dict[str, int]:
    """:func:`resize_adapter_` for layers that are found already."""
    check_size(rank, budget, energy)
    check_base_unchanged(layers, "resize_adapter_")
    for name, layer in layers.items():
        if layer.gate is not None or layer.groups is not None or layer.pool is not None:
            raise AdapterError(f"{name} is in a run of lorank, or reserved for one: resize the adapter after the run")
        if not bool(layer.A.isfinite().all() and layer.B.isfinite().all()):
            raise AdapterError(f"{name} has weights that are NaN or infinite, so it has no singular values")
    if rank is not None:
        wanted = dict.fromkeys(layers, rank)
        found = {name: UpdateSvd(layer) for name, layer in layers.items() if layer.rank > rank}
    else:
        found = {name: UpdateSvd(layer) for name, layer in layers.items()}
        if not any(bool(one.values.any()) for one in found.values()):
            raise AdapterError("the adapter has no update (B A = 0 in every module): there is nothing to measure")
        wanted = _ranks_for_energy(layers, found, energy) if energy is not None else _ranks_for(layers, found, budget)
    shrunk = {name: count for name, count in wanted.items() if count < layers[name].rank}
    factors = {name: _factors(layers[name], found[name], count) for name, count in shrunk.items()}
    plan = {name: plan_for_rank(layers[name].rank, count) for name, count in wanted.items()}
    # in a module that shrinks, which ranks stay is without meaning: their values are replaced
    plan.update({name: LayerPlan(tuple(range(len(A)))) for name, (A, _) in factors.items()})
    resize_(layers, plan, seed=seed)
    for name, (A, B) in factors.items():
        for axis, weight, matrix in zip(layers[name].axes, (layers[name].A, layers[name].B), (A, B), strict=True):
            weight.copy_(axis.tensor(matrix, weight.shape))
    return layers.ranks


def check_size(rank: int | None, budget: BudgetLike, energy: float | None) -> None:
    """Raises BudgetError unless exactly one size is given, and in its range."""
    given = {
        name: value for name, value in (("rank", rank), ("budget", budget), ("energy", energy)) if value is not None
    }
    if len(given) != 1:
        raise BudgetError(f"give one of rank, budget and energy; given: {', '.join(given) or 'none'}")
    if rank is not None and rank < 1:
        raise BudgetError(f"rank={rank}: expected at least 1")
    if energy is not None and not 0 < energy <= 1:
        raise BudgetError(f"energy={energy}: expected a share above 0 and at most 1, such as 0.95")


def _ranks_for(layers: AdapterLayers, found: Mapping[str, UpdateSvd], budget: BudgetLike) -> dict[str, int]:
    resolved = Budget.parse(budget).resolve(layers)
    if resolved.fits(layers.ranks):
        raise BudgetError(
            f"the adapter already fits the budget of {resolved.describe()}: give a smaller one; to grow, give a rank"
        )
    worth = {name: (layers[name].scaling * one.values) ** 2 for name, one in found.items()}
    return {name: len(kept) for name, kept in resolved.keep_best(resolved.per_cost(worth)).items()}


def _ranks_for_energy(layers: AdapterLayers, found: Mapping[str, UpdateSvd], energy: float) -> dict[str, int]:
    ranks = {}
    for name, one in found.items():
        squares = one.values.square()
        needed = (min(energy, 1 - ROUNDING)) * squares.sum()
        count = int((squares.cumsum(0) < needed).sum()) + 1 if bool(squares.any()) else 0
        ranks[name] = max(layers[name].min_rank, count)
    return ranks


def _factors(layer: AdapterLayer, found: UpdateSvd, count: int) -> tuple[Tensor, Tensor]:
    axis = 0 if layer.is_embedding else 1
    weight = layer.B_matrix if layer.is_embedding else layer.A_matrix
    norm = float(torch.linalg.vector_norm(weight.double(), dim=axis).mean()) or 1.0
    return found.factors(min(count, len(found.values)), norm, norm_of_A=not layer.is_embedding)
