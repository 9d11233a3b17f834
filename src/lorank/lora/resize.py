"""Changes the rank of LoRA layers in place. No other code changes the shape of a weight.

The rank changes on the same ``nn.Parameter``, so that hooks, parameter groups and the bookkeeping of distributed
training remain valid. Kept ranks keep their values, gradients and optimiser moments bit for bit. New ranks start with A
as PEFT initialises it, B = 0 and zero moments, so that the model's output does not change. For an embedding, PEFT's
initialisation is A = 0 and B random. If the adapter was initialised from the base weights or from data (PiSSA, OLoRA,
EVA, …), new ranks use PEFT's default initialisation.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import torch
from peft.tuners.tuners_utils import check_target_module_exists
from torch import Tensor, nn

from lorank.errors import OptimizerStateError, PlanError
from lorank.lora.layer import AdapterLayer, AdapterLayers
from lorank.lora.optimizer_state import check_state, plan_state_update, unwrap_optimizer
from lorank.lora.rank_index import reindex_ranks
from lorank.lora.resize_plan import LayerPlan, Plan, check_heads, check_places
from lorank.lora.variants.gated import register_plain_lora_hooks


@torch.no_grad()
def resize_(
    layers: AdapterLayers, plan: Plan, optimizer: torch.optim.Optimizer | None = None, *, seed: int = 0
) -> None:
    """Carries out a plan: weights, gradients, gates, optimiser state, PEFT's fields and the live ``LoraConfig``.

    Everything is checked before anything changes, so an error leaves the model and the optimiser unchanged.

    Args:
        layers: all LoRA layers of one adapter.
        plan: for each layer to change, the ranks to keep and the number of ranks to add.
        optimizer: the optimiser that holds their parameters, also inside accelerate's wrapper; or None.
        seed: the seed of the new ranks. The layer at position i uses its own generator, seeded by (seed, i). The global
            random state is neither read nor advanced, and every process draws the same numbers.

    Raises:
        PlanError: the plan names a layer or a rank that does not exist, names a rank twice, gives a layer more than
            min(d_in, d_out) or fewer than ``min_rank`` ranks, or leaves no rank in the whole model; a layer is merged;
            or the call is under ``torch.inference_mode``.
        OptimizerStateError: the optimiser does not hold a parameter, or its state has an unknown shape.
    """
    _check_plan(layers, plan)
    inner = unwrap_optimizer(optimizer) if optimizer is not None else None
    changes = [(i, layers[name], plan[name]) for i, name in enumerate(layers) if name in plan]
    changes = [
        (i, layer, layer_plan) for i, layer, layer_plan in changes if layer_plan.origins != tuple(range(layer.rank))
    ]
    states = [_plan_states(inner, layer, layer_plan) for _, layer, layer_plan in changes]
    for (index, layer, layer_plan), state_updates in zip(changes, states, strict=True):
        _resize_layer(
            layer,
            layer_plan,
            torch.Generator().manual_seed(_combine_seeds(seed, index)),
            layers.config.init_lora_weights,
        )
        for update in state_updates:
            update()
        if inner is not None:
            check_state(inner, f"{layer.name}.lora_A", layer.A)
            check_state(inner, f"{layer.name}.lora_B", layer.B)
    if changes:
        if layers.gates is not None:
            layers.learn_gates(torch.cat([layer.gate for layer in layers.values()]))  # type: ignore[misc]  # all are set
        write_patterns(layers)


def _check_plan(layers: AdapterLayers, plan: Plan) -> None:
    if torch.is_inference_mode_enabled():
        raise PlanError("ranks cannot change under torch.inference_mode(); use torch.no_grad()")
    unknown = sorted(set(plan) - set(layers))
    if unknown:
        raise PlanError(
            f"the plan names {unknown[0]!r}, which is not one of the {len(layers)} LoRA layers: use the names in layers"
        )
    for name, layer_plan in plan.items():
        layer = layers[name]
        if layer.module.merged:
            raise PlanError(f"{name} is merged into the base weights: call model.unmerge_adapter() first")
        if len(set(layer_plan.keep)) != len(layer_plan.keep) or any(
            not 0 <= rank < layer.rank for rank in layer_plan.keep
        ):
            raise PlanError(
                f"{name} has ranks 0 to {layer.rank - 1}, and each can be kept once; the plan keeps "
                f"{list(layer_plan.keep)}"
            )
        check_places(name, layer_plan)
        check_heads(layer, layer_plan)
        # The user may have made a layer with more than min(d_in, d_out) ranks. Such a layer only cannot grow.
        if layer_plan.add < 0 or (layer_plan.add and layer_plan.rank > layer.max_rank):
            most = "min(d_in, d_out) = " if layer.pool is None else "the reserved "
            raise PlanError(
                f"{name} can hold at most {most}{layer.max_rank} ranks; the plan asks for {layer_plan.rank}"
            )
        if layer_plan.rank < min(layer.min_rank, layer.rank):
            raise PlanError(f"{name} uses DoRA, which needs at least one rank; the plan leaves none")
    if not any(plan[name].rank if name in plan else layer.rank for name, layer in layers.items()):
        raise PlanError("the plan leaves no rank in any module: an adapter without weights cannot be saved or trained")


def _plan_states(
    optimizer: torch.optim.Optimizer | None, layer: AdapterLayer, layer_plan: LayerPlan
) -> list[Callable[[], None]]:
    if optimizer is None:
        return []
    origins = torch.tensor(layer_plan.origins, dtype=torch.long)
    held_ids = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for label, parameter in (("lora_A", layer.A), ("lora_B", layer.B)):
        if parameter.requires_grad and id(parameter) not in held_ids:
            raise OptimizerStateError(
                f"the optimiser does not hold {layer.name}.{label}: make it from the PEFT model's parameters, after "
                "get_peft_model, e.g. AdamW(p for p in model.parameters() if p.requires_grad)"
            )
    return [
        plan_state_update(optimizer, f"{layer.name}.lora_A", layer.A, 0, origins),
        plan_state_update(optimizer, f"{layer.name}.lora_B", layer.B, 1, origins),
    ]


def _resize_layer(layer: AdapterLayer, layer_plan: LayerPlan, generator: torch.Generator, init: Any) -> None:
    origins = torch.tensor(layer_plan.origins, dtype=torch.long)
    new = origins < 0  # (r,)
    A, B = layer.A, layer.B
    new_A = reindex_ranks(A.data, origins, 0)  # (r, d_in)
    new_B = reindex_ranks(B.data, origins, 1)  # (d_out, r)
    if layer_plan.add:
        fresh, rows = _draw_new_vectors(layer, layer_plan, generator, init)  # (add, d)
        if rows:
            new_A[new] = fresh.to(new_A)
        else:
            new_B[:, new] = fresh.T.to(new_B)
    gate = layer.gate
    layer.gate = None
    _assign_resized(A, new_A, 0, origins)
    _assign_resized(B, new_B, 1, origins)
    if layer_plan.head_ranks is not None:
        layer.set_heads(layer.groups, layer_plan.head_ranks)
    module, adapter, rank = layer.module, layer.adapter, layer_plan.rank
    if not layer.is_embedding:
        module.lora_A[adapter].out_features = rank
        module.lora_B[adapter].in_features = rank
    module.r[adapter] = rank
    module.lora_alpha[adapter] = alpha_for(layer.scaling, rank, layer.use_rslora)
    # PEFT computes the scaling from alpha when it loads a file. The same computation makes both scalings bitwise equal.
    module.scaling[adapter] = scaling_of(module.lora_alpha[adapter], rank, layer.use_rslora) or layer.scaling
    if not rank:
        register_plain_lora_hooks(module)
    if gate is not None:
        grown = reindex_ranks(gate.detach(), origins, gate.dim() - 1)
        grown[..., new.to(grown.device)] = 1
        layer.gate = grown


def _draw_new_vectors(
    layer: AdapterLayer, layer_plan: LayerPlan, generator: torch.Generator, init: Any
) -> tuple[Tensor, bool]:
    """New vectors (add, d) as PEFT initialises them, and whether they are rows of A (else columns of B)."""
    if layer.is_embedding:  # PEFT: A = 0, B ~ N(0, 1)
        return torch.randn((layer_plan.add, layer.d_out), generator=generator), False
    width = layer.A.shape[1]  # d_in, or the width of a head where each head has its own A
    shape = (layer_plan.add, width)
    if isinstance(init, str) and init.lower() == "gaussian":  # PEFT: N(0, 1/r)
        return torch.randn(shape, generator=generator) / layer_plan.rank, True
    bound = 1 / math.sqrt(width)  # kaiming_uniform_(a=√5) with this number of inputs
    return torch.rand(shape, generator=generator) * (2 * bound) - bound, True


def _assign_resized(parameter: nn.Parameter, data: Tensor, axis: int, origins: Tensor) -> None:
    """Replaces the data of a Parameter after a resize, and reindexes its gradient."""
    gradient = None if parameter.grad is None else reindex_ranks(parameter.grad, origins, axis)
    replace_data(parameter, data, gradient)


def replace_data(parameter: nn.Parameter, data: Tensor, gradient: Tensor | None = None) -> None:
    """Replaces a Parameter's data by data of any shape, and its gradient by one of that shape or by None."""
    parameter.grad = None
    # A live graph (a kept loss, DDP, torch.compile) holds an AccumulateGrad node with the old shape. Assigning data of
    # another dtype in between makes autograd drop this node, so that the next backward pass gets a new one.
    other = torch.float16 if data.dtype != torch.float16 else torch.float32
    parameter.data = torch.empty(0, dtype=other, device=data.device)
    parameter.data = data
    parameter.grad = gradient


def _combine_seeds(seed: int, index: int) -> int:
    """Combines two seeds into one (splitmix64's odd multipliers), so that neighbouring seeds give distant results."""
    return (seed * 0x9E3779B97F4A7C15 + index * 0xBF58476D1CE4E5B9 + 0x94D049BB133111EB) % 2**63


def alpha_for(scaling: float, rank: int, use_rslora: bool) -> float:
    """PEFT's alpha, for which alpha / r (rsLoRA: alpha / √r) is s. A whole number is returned as an int."""
    alpha = scaling * (math.sqrt(rank) if use_rslora else rank)
    return int(alpha) if alpha == int(alpha) else alpha


def scaling_of(alpha: float, rank: int, use_rslora: bool) -> float:
    """PEFT's scaling: alpha / r, or alpha / √r for rsLoRA. 0 for rank 0."""
    return alpha / (math.sqrt(rank) if use_rslora else rank) if rank else 0.0


def write_patterns(layers: AdapterLayers) -> None:
    """Writes all ranks and alphas to the live ``LoraConfig``, so that PEFT saves and reloads them exactly.

    PEFT treats the keys of its patterns as regular expressions that may match the end of a name, and uses the first
    match. So a key is ``^`` and the escaped full name, and every module has a key. A missing alpha would silently load
    a wrong scaling. r = the largest rank and alpha = s·r also make the global values correct, for servers that ignore
    the patterns. PEFT's configuration refuses rank 0, so ``target_modules`` lists only the modules with ranks.
    """
    config = layers.config
    alive = {name: layer for name, layer in layers.items() if layer.rank}
    largest = max(layer.rank for layer in alive.values())
    config.rank_pattern = {f"^{re.escape(name)}": layer.rank for name, layer in alive.items()}
    config.alpha_pattern = {
        f"^{re.escape(name)}": layer.module.lora_alpha[layer.adapter] for name, layer in alive.items()
    }
    config.r = largest
    scalings = {layer.scaling for layer in alive.values()}
    if len(scalings) == 1:
        config.lora_alpha = alpha_for(scalings.pop(), largest, config.use_rslora)
    if len(alive) == len(layers):
        config.target_modules = layers.target_modules
        # Layers that were found while a module had rank 0 have read a list without it.
        if all(check_target_module_exists(config, name) for name in layers):
            return
    config.target_modules = set(alive)
    if any(check_target_module_exists(config, name) for name in layers if name not in alive):
        # A name in a set also matches a longer name that ends with it. A string must match the whole name.
        config.target_modules = "|".join(re.escape(name) for name in alive)
