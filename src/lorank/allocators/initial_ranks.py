"""Initial ranks chosen from data before training, under the same budget as uniform ranks.

**gradient**. At the start B = 0, so the model is the base model. To first order, an update ΔW reduces the loss by

    L(W) − L(W + ΔW) ≈ −⟨G, ΔW⟩          G = ∂L/∂W of the frozen weight, over a few batches

By Eckart–Young, the best gradient step of rank r is the rank-r part of −ηG, with G = Σ_i σ_i u_i v_iᵀ. It reduces the
loss by η Σ_{i≤r} σ_i². LoRA takes this step on B, with A along v_1 … v_r. The chain rule gives one factor s, and
ΔW = s B A gives another. So the i-th rank of module m reduces the loss by

    η s_m² σ_{m,i}²

with the same learning rate η for all modules. The ranks with the largest values, divided by what a rank costs in the
unit of the budget, are chosen over all modules, as far as the budget allows. A keeps its random initial values; only
its number of rows is chosen (:func:`lorank.gradient_start_` also chooses the directions). This estimate ignores
curvature, Adam's scaling of each gradient, and the change of G during training.

**eva**. PEFT's EVA (:mod:`lorank.lora.eva`) uses the inputs of each module instead of the loss: the chosen ranks
explain most of the inputs' variance, and A starts along these directions.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from torch import nn

from lorank.allocators.budget import Budget, BudgetLike
from lorank.allocators.gradient_start import check_fresh, gradient_plan
from lorank.allocators.resolved_budget import ResolvedBudget
from lorank.errors import BudgetError
from lorank.lora import AdapterLayers, check_base_unchanged, find_layers, plan_for_rank, resize_
from lorank.lora.eva import eva_components
from lorank.scoring import Context, TrainingInfo
from lorank.scoring.loss import LossFn


def initial_ranks_(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    *,
    method: Literal["gradient", "eva"] = "gradient",
    budget: BudgetLike = None,
    adapter: str | None = None,
    loss_fn: LossFn | None = None,
    seed: int = 0,
) -> dict[str, int]:
    """Chooses a rank from data for each module of a fresh LoRA adapter, before the optimiser is created.

        model = get_peft_model(base, LoraConfig(r=8, target_modules="all-linear"))
        lorank.initial_ranks_(model, batches)
        optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)

    Args:
        model: a model with a LoRA adapter that has not been trained (B = 0).
        batches: a few batches of training data with ``labels``, e.g. 8 of 16 samples; all are kept in memory.
        method: ``"gradient"`` or ``"eva"``, see the top of this file.
        budget: the adapter's budget, see :class:`~lorank.allocators.budget.Budget`; None: the adapter's present total
            number of ranks. EVA counts in ranks; for a budget in another unit, its ranks are scaled in proportion.
        adapter: name of the adapter; None: the active adapter.
        loss_fn: ``loss_fn(model, batch)`` → a scalar, in place of ``model(**batch).loss``; for ``"gradient"``.
        seed: seed of the values of new ranks, and of the random directions for large matrices.

    Returns:
        The rank of each module.

    Raises:
        AdapterError: there is no LoRA adapter, or it has already been trained (or was made with B ≠ 0, as by
            ``orthogonal``), or its initialisation changed the base weights (PiSSA, …).
        BudgetError: the budget cannot be parsed or does not fit the modules; or the method is unknown.
        ValidationBatchError: there is no batch, a batch gives no loss, or a batch is too small for EVA.
    """
    if method not in ("gradient", "eva"):
        raise BudgetError(f"initial ranks by {method!r}: expected 'gradient' or 'eva'")
    layers = find_layers(model, adapter)
    check_base_unchanged(layers, "initial_ranks_")
    check_fresh(layers)
    resolved = _resolve(layers, budget)
    kept = list(batches)
    if method == "gradient":
        context = Context(0, TrainingInfo(1, seed=seed), model, layers, loss_fn=loss_fn, train_batches=kept)
        resize_(layers, gradient_plan(context, resolved, directions=False), seed=seed)
    else:
        _eva(layers, resolved, kept, seed, model)
    return layers.ranks


def _eva(
    layers: AdapterLayers, budget: ResolvedBudget, batches: list[Mapping[str, Any]], seed: int, model: nn.Module
) -> None:
    # Every module takes part with at least one rank, also where the budget has fewer ranks than there are modules. What
    # exceeds the budget is then removed in proportion, below.
    even = {name: max(1, rank) for name, rank in budget.uniform().items()}
    components = eva_components(layers, batches, even, budget.caps, model)
    wanted = {name: max(budget.minima[name], len(components.get(name, range(even[name])))) for name in layers}
    if not budget.is_used_up_by(wanted):
        # Scaled in proportion: each module first loses its least important components, in proportion to its rank. A
        # module to which EVA gave no rank receives one only after the ranks of all others have doubled.
        standing = {name: -torch.arange(1, budget.caps[name] + 1) / max(rank, 0.5) for name, rank in wanted.items()}
        wanted = {name: len(chosen) for name, chosen in budget.keep_best(standing).items()}
    resize_(layers, {name: plan_for_rank(layers[name].rank, rank) for name, rank in wanted.items()}, seed=seed)
    with torch.no_grad():
        for name, found in components.items():
            rows = min(len(found), layers[name].rank)
            layers[name].A[:rows].copy_(found[:rows])


def _resolve(layers: AdapterLayers, budget: BudgetLike) -> ResolvedBudget:
    if budget is not None:
        return Budget.parse(budget).resolve(layers)
    holds = sum(layer.max_rank for layer in layers.values())
    return Budget(ranks=min(layers.total_rank, holds)).resolve(layers)
