"""Ranks chosen from data before training begins, under the same budget as uniform ones.

**gradient**. At the start B = 0, so the model is the base model and the loss falls, to first order, by

    L(W) − L(W + ΔW) ≈ −⟨G, ΔW⟩          G = ∂L/∂W of the frozen weight, over a few batches

The step against the gradient that a rank-r update can take is, by Eckart–Young, the best rank-r part of −ηG with
G = Σ_i σ_i u_i v_iᵀ: it wins η Σ_{i≤r} σ_i². LoRA takes that step on B, with A along v_1 … v_r and a factor s from the
chain rule and another from ΔW = s B A, so the i-th rank of module m is worth

    η s_m² σ_{m,i}²

with one learning rate η for all. Ranks go to the largest of these over all modules, as far as the budget allows. A
keeps its ordinary random values: only how many rows it has is chosen. What this does not see: curvature, Adam's own
scaling of each gradient, and that G changes while training.

**eva**. PEFT's own EVA (:mod:`lorank.lora.eva`), which looks at the inputs of each module instead of the loss: ranks go
where they explain most of the inputs' variance, and A starts along those directions.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lorank.allocators.budget import Budget, BudgetLike
from lorank.allocators.resolved_budget import ResolvedBudget
from lorank.errors import AdapterError, BudgetError
from lorank.lora import AdapterLayers, find_layers, plan_for_rank, resize_
from lorank.lora.eva import eva_components
from lorank.scoring import weight_gradient_singular_values
from lorank.scoring.loss import LossFn

GROWTH = 4
"""By gradient, a module may receive at most so many times the mean rank (and 16 in any case)."""


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
    """Gives each module of a fresh LoRA adapter a rank of its own, from data, before the optimiser is made.

        model = get_peft_model(base, LoraConfig(r=8, target_modules="all-linear"))
        lorank.initial_ranks_(model, batches)
        optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)

    Args:
        model: a model with a LoRA adapter that has not been trained (B = 0).
        batches: a few batches of training data with ``labels``, e.g. 8 of 16 samples; kept in memory.
        method: ``"gradient"`` or ``"eva"``, see the top of this file.
        budget: what the adapter may cost, see :class:`~lorank.allocators.budget.Budget`; None: as many ranks in all as
            it has. EVA counts in ranks: its ranks are scaled in proportion to a budget in another unit.
        adapter: name of the adapter; None: the active one.
        loss_fn: ``loss_fn(model, batch)`` → a scalar, in place of ``model(**batch).loss``; for ``"gradient"``.
        seed: of the values of new ranks, and of the random directions for large matrices.

    Returns:
        The rank of each module.

    Raises:
        AdapterError: no LoRA adapter, or one that has been trained (or was made with B ≠ 0, as PiSSA's).
        BudgetError: a budget that cannot be read or does not fit the modules; an unknown method.
        ValidationBatchError: no batch, one that gives no loss, or too small a one for EVA.
    """
    if method not in ("gradient", "eva"):
        raise BudgetError(f"initial ranks by {method!r}: expected 'gradient' or 'eva'")
    layers = find_layers(model, adapter)
    _check_fresh(layers)
    limits = _limits(layers, budget)
    kept = list(batches)
    if method == "gradient":
        mean_rank = sum(limits.uniform().values()) / len(layers)
        most = max(16, round(GROWTH * mean_rank))
        values = weight_gradient_singular_values(model, layers, kept, most, loss_fn=loss_fn, seed=seed)
        worth = {name: (layers[name].scaling * sigma) ** 2 for name, sigma in values.items()}
        ranks = {name: len(chosen) for name, chosen in limits.keep_best(worth).items()}
        resize_(layers, {name: plan_for_rank(layers[name].rank, rank) for name, rank in ranks.items()}, seed=seed)
    else:
        _eva(layers, limits, kept, seed)
    return layers.ranks


def _eva(layers: AdapterLayers, limits: ResolvedBudget, batches: list[Mapping[str, Any]], seed: int) -> None:
    even = limits.uniform()
    components = eva_components(layers, batches, even, limits.caps)
    wanted = {name: max(limits.minima[name], len(components.get(name, range(even[name])))) for name in layers}
    if not limits.is_used_up_by(wanted):
        # In proportion: the last of a module's components matter least to it, and no module pays for the others. One
        # that EVA gave nothing comes after all others have doubled.
        standing = {name: -torch.arange(1, limits.caps[name] + 1) / max(rank, 0.5) for name, rank in wanted.items()}
        wanted = {name: len(chosen) for name, chosen in limits.keep_best(standing).items()}
    resize_(layers, {name: plan_for_rank(layers[name].rank, rank) for name, rank in wanted.items()}, seed=seed)
    with torch.no_grad():
        for name, found in components.items():
            rows = min(len(found), layers[name].rank)
            layers[name].A[:rows].copy_(found[:rows])


def _limits(layers: AdapterLayers, budget: BudgetLike) -> ResolvedBudget:
    if budget is not None:
        return Budget.parse(budget).resolve(layers)
    holds = sum(layer.max_rank for layer in layers.values())
    return Budget(ranks=min(layers.total_rank, holds)).resolve(layers)


def _check_fresh(layers: AdapterLayers) -> None:
    for name, layer in layers.items():
        start: Tensor = layer.A if layer.is_embedding else layer.B  # PEFT starts embeddings the other way round
        if layer.rank and bool(start.detach().any()):
            raise AdapterError(
                f"{name} already has an update (B ≠ 0): initial ranks are for a fresh adapter. Choose them right after "
                "get_peft_model, and make the adapter without an init_lora_weights that sets B (PiSSA, OLoRA, LoftQ)"
            )
