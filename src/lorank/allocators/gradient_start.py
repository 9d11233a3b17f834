"""A gradient start: A begins with the directions in which B learns most, and modules with the ranks these are worth.

At B = 0 the gradient of B is s G Aᵀ, with G = ∂L/∂W. The orthonormal rows of A that make it largest are the top right
singular vectors v_i of G, and rank i then contributes (s σ_i(G))². So over all modules the ranks with the largest

    (s_m σ_{m,i})² / cost of a rank in module m

are chosen, as far as the budget allows, and the rows of A are their v_i, each of the norm of the rows that PEFT made.
The base weights stay as they are (LoRA-GA and PiSSA change them), so the result is an ordinary adapter.

In an embedding, A begins at zero and B does not: there the left singular vectors take the place of B's columns.

Neighbours: GradMax (arXiv 2201.05125), LoRA-One (2502.01235), GoRA (2502.12171).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lorank.allocators.budget import Budget, BudgetLike
from lorank.allocators.resolved_budget import ResolvedBudget
from lorank.errors import AdapterError, BudgetError
from lorank.lora import (
    AdapterLayer,
    AdapterLayers,
    LayerPlan,
    NewVectors,
    Plan,
    check_base_unchanged,
    find_layers,
    resize_,
)
from lorank.scoring import Context, TrainingInfo, WeightGradient, weight_gradients
from lorank.scoring.loss import LossFn

START_BATCHES = 4
"""How many batches suffice: in prototypes, 8 and 16 gave no lower loss."""

GROWTH = 4
"""The highest initial rank of a module as a multiple of the mean rank (but at least 16)."""


def gradient_start_(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    *,
    ranks: Literal["gradient", "keep"] = "gradient",
    budget: BudgetLike = None,
    adapter: str | None = None,
    loss_fn: LossFn | None = None,
    seed: int = 0,
) -> dict[str, int]:
    """Chooses A's directions and the rank of each module of a fresh LoRA adapter, by the gradient of a few batches.

        model = get_peft_model(base, LoraConfig(r=8, target_modules="all-linear"))
        lorank.gradient_start_(model, batches)
        optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)

    Needs no run of lorank: what follows may be any training of the PEFT model. The model's output does not change.

    Args:
        model: a model with a LoRA adapter that has not been trained (B = 0).
        batches: a few batches of training data with ``labels``, e.g. 4 of the size that training uses; all are kept in
            memory.
        ranks: ``"gradient"`` chooses a rank for each module; ``"keep"`` leaves the ranks as they are.
        budget: the adapter's budget, see :class:`~lorank.allocators.budget.Budget`; None: as many trained numbers as
            the adapter has. With ``ranks="keep"`` there is none to give.
        adapter: name of the adapter; None: the active adapter.
        loss_fn: ``loss_fn(model, batch)`` → a scalar, in place of ``model(**batch).loss``.
        seed: seed of the random directions for large matrices.

    Returns:
        The rank of each module.

    Raises:
        AdapterError: there is no LoRA adapter, or it has already been trained (or was made with B ≠ 0, as by
            ``orthogonal``), or its initialisation changed the base weights (PiSSA, …).
        BudgetError: the budget cannot be parsed or does not fit the modules; or ``ranks`` is unknown.
        ValidationBatchError: there is no batch, or a batch gives no loss.
    """
    if ranks not in ("gradient", "keep"):
        raise BudgetError(f"gradient_start_(ranks={ranks!r}): expected 'gradient' or 'keep'")
    if ranks == "keep" and budget is not None:
        raise BudgetError(
            f"gradient_start_(ranks='keep', budget={budget!r}): a budget chooses ranks, so give ranks='gradient', or "
            "no budget"
        )
    layers = find_layers(model, adapter)
    check_base_unchanged(layers, "gradient_start_")
    check_fresh(layers)
    resolved = None
    if ranks == "gradient":
        resolved = Budget.parse("100% of adapter" if budget is None else budget).resolve(layers)
    plan = gradient_plan(
        Context(0, TrainingInfo(1, seed=seed), model, layers, loss_fn=loss_fn, train_batches=list(batches)), resolved
    )
    resize_(layers, plan, seed=seed)
    return layers.ranks


def gradient_plan(context: Context, budget: ResolvedBudget | None, *, directions: bool = True) -> Plan:
    """The plan of a gradient start.

    Layers that have an update (A and B are not zero) keep all their ranks, and may receive further ones; there G is
    the gradient that the present adapter leaves.

    Args:
        context: has the model, its layers and the training batches.
        budget: decides the ranks; None: every module keeps its number of ranks.
        directions: whether A begins with the singular vectors; False: as PEFT initialises it.

    Raises:
        ValidationBatchError: there is no batch, or a batch gives no loss.
    """
    layers = context.layers
    most = _most(layers, budget)
    found = weight_gradients(
        context.model,
        layers,
        context.train_batches,
        most,
        loss_fn=context.loss_fn,
        seed=context.run.seed,
        mean=context.mean,
    )
    kept = {name: layer.rank if has_update(layer) else 0 for name, layer in layers.items()}
    ranks = layers.ranks if budget is None else _ranks(layers, budget, found, kept)
    plan: dict[str, LayerPlan] = {}
    for name, layer in layers.items():
        keep, add = kept[name], max(0, ranks[name] - kept[name])
        gradient = found[name]
        if not directions and not keep:  # the rows that are there are as good as new ones
            keep = min(layer.rank, ranks[name])
            add = ranks[name] - keep
        if add and keep + add > layer.max_rank:  # made with more ranks than there are directions
            continue
        known = directions and bool(gradient.values[:1] > 0) and len(gradient.values) >= add
        vectors = NewVectors(vectors_along(layer, gradient, add)) if known and add else None
        plan[name] = LayerPlan(tuple(range(keep)), add, vectors=vectors)
    return plan


def check_fresh(layers: AdapterLayers) -> None:
    """Raises AdapterError if the adapter has an update already."""
    for name, layer in layers.items():
        if has_update(layer):
            raise AdapterError(
                f"{name} already has an update (B ≠ 0): initial ranks and directions need a fresh adapter. Choose them "
                "right after get_peft_model, and do not use an init_lora_weights that sets B ('orthogonal', False)"
            )


def has_update(layer: AdapterLayer) -> bool:
    """Whether B A is not zero, judged by the factor that PEFT sets to zero: B, or A for embeddings."""
    start: Tensor = layer.A if layer.is_embedding else layer.B
    return bool(layer.rank) and bool(start.detach().any())


def _most(layers: AdapterLayers, budget: ResolvedBudget | None) -> int:
    """The number of singular values to compute per module."""
    if budget is None:
        return max(layers.ranks.values())
    even = budget.uniform()
    return max(16, round(GROWTH * sum(even.values()) / len(even)))


def _ranks(
    layers: AdapterLayers, budget: ResolvedBudget, found: Mapping[str, WeightGradient], kept: Mapping[str, int]
) -> dict[str, int]:
    worth = {name: (layers[name].scaling * one.values) ** 2 for name, one in found.items()}
    worth = budget.per_cost(worth)
    # ranks that are there come first
    scores = {name: torch.cat([torch.full((kept[name],), math.inf).double(), worth[name]]) for name in layers}
    return {name: max(kept[name], len(chosen)) for name, chosen in budget.keep_best(scores).items()}


def vectors_along(layer: AdapterLayer, gradient: WeightGradient, count: int) -> Tensor:
    """The first values of new ranks, (count, d): of the norm of PEFT's own rows."""
    vectors = (gradient.left if layer.is_embedding else gradient.right)[:, :count].T  # (count, d)
    weight = layer.B_matrix.T if layer.is_embedding else layer.A_matrix  # (r, d)
    norms: Tensor = torch.linalg.vector_norm(weight.detach().double(), dim=1)
    default = math.sqrt(layer.d_out) if layer.is_embedding else math.sqrt(layer.axes[0].copies / 3)
    norm = float(norms.mean()) if len(norms) and bool(norms.any()) else default
    return vectors * norm
