"""The only code that changes a shape.

A LoRA layer's rank is changed in place, on the same ``nn.Parameter``, so that hooks, parameter groups and the
bookkeeping of distributed training stay. Ranks that are kept keep their values, gradients and optimiser moments, bit
for bit; new ranks start with A as at first initialisation, B = 0 and zero moments, so that the model's output does not
change. For an embedding PEFT's initialisation is the other way round: A = 0, B random. Where the adapter was made from
the base weights or from data (PiSSA, OLoRA, EVA, …), new ranks are drawn as PEFT's default draws them.
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
from lorank.lora.optimizer_state import check_state, plan_state, unwrap_optimizer
from lorank.lora.plan import LayerPlan, Plan, check_heads, check_places
from lorank.lora.rank_index import reindex_ranks
from lorank.lora.variants.gated import show_plain


@torch.no_grad()
def resize_(
    layers: AdapterLayers, plan: Plan, optimizer: torch.optim.Optimizer | None = None, *, seed: int = 0
) -> None:
    """Carries out a plan: weights, gradients, gates, optimiser state, PEFT's fields and the live ``LoraConfig``.

    Everything is checked before anything moves, so an error leaves model and optimiser as they were.

    Args:
        layers: all LoRA layers of one adapter.
        plan: for each layer to change, the ranks to keep and how many to add.
        optimizer: the optimiser that holds their parameters, or None. Accelerate's wrapper is seen through.
        seed: new ranks of the layer at position i draw from a generator of their own, seeded by (seed, i): the global
            random state is neither read nor advanced, and every process draws the same numbers.

    Raises:
        PlanError: a layer or rank that is not there, a rank named twice, a rank above min(d_in, d_out) or below the
            layer's ``min_rank``, a plan that leaves no rank at all, or a call under ``torch.inference_mode``.
        OptimizerStateError: a parameter that the optimiser does not hold, or a state of unknown shape.
    """
    _check_plan(layers, plan)
    inner = unwrap_optimizer(optimizer) if optimizer is not None else None
    changes = [(i, layers[name], plan[name]) for i, name in enumerate(layers) if name in plan]
    changes = [(i, layer, wanted) for i, layer, wanted in changes if wanted.origins != tuple(range(layer.rank))]
    states = [_plan_states(inner, layer, wanted) for _, layer, wanted in changes]
    for (index, layer, wanted), state_updates in zip(changes, states, strict=True):
        _resize_layer(layer, wanted, torch.Generator().manual_seed(_mix(seed, index)), layers.config.init_lora_weights)
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
        raise PlanError(f"the plan names {unknown[0]!r}, which is not one of the {len(layers)} LoRA layers")
    for name, wanted in plan.items():
        layer = layers[name]
        if layer.module.merged:
            raise PlanError(f"{name} is merged into the base weights: call model.unmerge_adapter() first")
        if len(set(wanted.keep)) != len(wanted.keep) or any(not 0 <= rank < layer.rank for rank in wanted.keep):
            raise PlanError(f"{name} has ranks 0 to {layer.rank - 1}; the plan keeps {list(wanted.keep)}")
        check_places(name, wanted)
        check_heads(layer, wanted)
        # A layer may have been made above min(d_in, d_out) by its owner; it is only not grown there.
        if wanted.add < 0 or (wanted.add and wanted.rank > layer.max_rank):
            most = "min(d_in, d_out) = " if layer.pool is None else "the reserved "
            raise PlanError(f"{name} can hold at most {most}{layer.max_rank} ranks; the plan asks for {wanted.rank}")
        if wanted.rank < min(layer.min_rank, layer.rank):
            raise PlanError(f"{name} uses DoRA, whose magnitudes need a rank beside them; the plan leaves none")
    if not any(plan[name].rank if name in plan else layer.rank for name, layer in layers.items()):
        raise PlanError("the plan leaves no rank in any module: an adapter without weights cannot be saved or trained")


def _plan_states(
    optimizer: torch.optim.Optimizer | None, layer: AdapterLayer, wanted: LayerPlan
) -> list[Callable[[], None]]:
    if optimizer is None:
        return []
    origins = torch.tensor(wanted.origins, dtype=torch.long)
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for label, parameter in (("lora_A", layer.A), ("lora_B", layer.B)):
        if parameter.requires_grad and id(parameter) not in held:
            raise OptimizerStateError(
                f"the optimiser does not hold {layer.name}.{label}: make it from the PEFT model's parameters, after "
                "get_peft_model, e.g. AdamW(p for p in model.parameters() if p.requires_grad)"
            )
    return [
        plan_state(optimizer, f"{layer.name}.lora_A", layer.A, 0, origins),
        plan_state(optimizer, f"{layer.name}.lora_B", layer.B, 1, origins),
    ]


def _resize_layer(layer: AdapterLayer, wanted: LayerPlan, generator: torch.Generator, init: Any) -> None:
    origins = torch.tensor(wanted.origins, dtype=torch.long)
    new = origins < 0  # (r,)
    A, B = layer.A, layer.B
    new_A = reindex_ranks(A.data, origins, 0)  # (r, d_in)
    new_B = reindex_ranks(B.data, origins, 1)  # (d_out, r)
    if wanted.add:
        fresh, rows = _fresh(layer, wanted, generator, init)  # (add, d)
        if rows:
            new_A[new] = fresh.to(new_A)
        else:
            new_B[:, new] = fresh.T.to(new_B)
    gate = layer.gate
    layer.gate = None
    _assign(A, new_A, 0, origins)
    _assign(B, new_B, 1, origins)
    if wanted.head_ranks is not None:
        layer.set_heads(layer.groups, wanted.head_ranks)
    module, adapter, rank = layer.module, layer.adapter, wanted.rank
    if not layer.is_embedding:
        module.lora_A[adapter].out_features = rank
        module.lora_B[adapter].in_features = rank
    module.r[adapter] = rank
    module.lora_alpha[adapter] = alpha_for(layer.scaling, rank, layer.use_rslora)
    # What PEFT will compute from the file, so that the live model and the reloaded one agree to the last bit.
    module.scaling[adapter] = scaling_of(module.lora_alpha[adapter], rank, layer.use_rslora) or layer.scaling
    if not rank:
        show_plain(module)
    if gate is not None:
        grown = reindex_ranks(gate.detach(), origins, gate.dim() - 1)
        grown[..., new.to(grown.device)] = 1
        layer.gate = grown


def _fresh(layer: AdapterLayer, wanted: LayerPlan, generator: torch.Generator, init: Any) -> tuple[Tensor, bool]:
    """New vectors (add, d) as PEFT first draws them, and whether they are rows (A) or columns (embedding's B)."""
    if layer.is_embedding:  # PEFT: A = 0, B ~ N(0, 1)
        return torch.randn((wanted.add, layer.d_out), generator=generator), False
    inputs = layer.A.shape[1]  # d_in, or the width of a head that has an A of its own
    shape = (wanted.add, inputs)
    if isinstance(init, str) and init.lower() == "gaussian":  # PEFT: N(0, 1/r)
        return torch.randn(shape, generator=generator) / wanted.rank, True
    bound = 1 / math.sqrt(inputs)  # kaiming_uniform_(a=√5) over as many inputs
    return torch.rand(shape, generator=generator) * (2 * bound) - bound, True


def _assign(parameter: nn.Parameter, data: Tensor, axis: int, origins: Tensor) -> None:
    """Gives the same Parameter data of another shape, its gradient following it."""
    gradient = None if parameter.grad is None else reindex_ranks(parameter.grad, origins, axis)
    replace_data(parameter, data, gradient)


def replace_data(parameter: nn.Parameter, data: Tensor, gradient: Tensor | None = None) -> None:
    """The same Parameter with data of any shape, and a gradient of that shape or none."""
    parameter.grad = None
    # A graph that is still alive (a kept loss, DDP, torch.compile) holds an AccumulateGrad node with the old shape.
    # Data of another dtype in between makes autograd drop it, so that the next backward meets a fresh one.
    other = torch.float16 if data.dtype != torch.float16 else torch.float32
    parameter.data = torch.empty(0, dtype=other, device=data.device)
    parameter.data = data
    parameter.grad = gradient


def _mix(seed: int, index: int) -> int:
    """One seed from two, well apart for neighbours (splitmix64's odd multipliers)."""
    return (seed * 0x9E3779B97F4A7C15 + index * 0xBF58476D1CE4E5B9 + 0x94D049BB133111EB) % 2**63


def alpha_for(scaling: float, rank: int, use_rslora: bool) -> float:
    """PEFT's alpha for which alpha / r (rsLoRA: alpha / √r) is s. Whole numbers are ints, as users write them."""
    alpha = scaling * (math.sqrt(rank) if use_rslora else rank)
    return int(alpha) if alpha == int(alpha) else alpha


def scaling_of(alpha: float, rank: int, use_rslora: bool) -> float:
    """What PEFT computes from a file: alpha / r, or alpha / √r. 0 for rank 0."""
    return alpha / (math.sqrt(rank) if use_rslora else rank) if rank else 0.0


def write_patterns(layers: AdapterLayers) -> None:
    """Restates ranks and alphas in the live ``LoraConfig``, so that PEFT saves and reloads them exactly.

    PEFT reads pattern keys as regular expressions that may match a suffix, the first one winning: hence ``^``, the
    escaped full name, and every module. A missing alpha would load silently wrong. With r = the largest rank and
    alpha = s·r the global values are right too, for servers that read nothing else. A module at rank 0 (which PEFT's
    configuration refuses) is left out by naming the others as targets.
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
        return
    config.target_modules = set(alive)
    if any(check_target_module_exists(config, name) for name in layers if name not in alive):
        # A full name that is the tail of another one would match it too; a regular expression is matched whole.
        config.target_modules = "|".join(re.escape(name) for name in alive)
