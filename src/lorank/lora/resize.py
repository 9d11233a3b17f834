"""Changes the rank of LoRA layers in place. No other code changes the shape of a weight.

The rank changes on the same ``nn.Parameter``, so that hooks, parameter groups and the bookkeeping of distributed
training remain valid. Kept ranks keep their values, gradients and optimiser moments bit for bit. New ranks start with A
as PEFT initialises it, B = 0 and the optimiser state of new weights, so that the model's output does not change. For an
embedding, PEFT's initialisation is A = 0 and B random. If the adapter was initialised from data or by a scheme of its
own (EVA, orthogonal), new ranks use PEFT's default initialisation. A plan may give other first values.

A plan may also turn a layer to another basis of its ranks (:mod:`lorank.lora.basis`), before it keeps some of them.
Then the weights and moments of kept ranks change, but not the model's output.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from torch import Tensor, nn

from lorank.errors import OptimizerStateError, PlanError
from lorank.lora.basis import Turn, turn_ranks
from lorank.lora.initialisation import check_base_unchanged, set_plain_init_
from lorank.lora.layer import AdapterLayer, AdapterLayers
from lorank.lora.optimizer_state import SecondMoments, plan_state_update, unwrap_optimizer
from lorank.lora.rank_index import reindex_ranks
from lorank.lora.rank_zero import target_entries, target_pattern
from lorank.lora.resize_plan import LayerPlan, Plan, check_basis, check_heads, check_places, check_vectors
from lorank.lora.scaling import alpha_for, scaling_of
from lorank.lora.variants.gated import update_plain_lora_hooks


@torch.no_grad()
def resize_(
    layers: AdapterLayers,
    plan: Plan,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    seed: int = 0,
    second_moments: SecondMoments = "zero",
) -> None:
    """Carries out a plan: weights, gradients, gates, optimiser state, PEFT's fields and the live ``LoraConfig``.

    Everything is checked before anything changes, so an error leaves the model and the optimiser unchanged.

    Args:
        layers: all LoRA layers of one adapter.
        plan: for each layer to change, the ranks to keep and the number of ranks to add; perhaps a basis.
        optimizer: the optimiser that holds their parameters, also inside accelerate's wrapper; or None.
        seed: the seed of the new ranks. The layer at position i uses its own generator, seeded by (seed, i). The global
            random state is neither read nor advanced, and every process draws the same numbers.
        second_moments: where the optimiser's second moments of new ranks begin: at ``"zero"``, as in a new optimiser,
            or at the ``"mean"`` over the parameter's kept ranks. A module without kept ranks begins at zero.

    Raises:
        PlanError: the plan names a layer or a rank that does not exist, names a rank twice, gives a layer more than
            min(d_in, d_out) or fewer than ``min_rank`` ranks, or leaves no rank in the whole model; a layer is merged;
            or the call is under ``torch.inference_mode``.
        AdapterError: the adapter's initialisation changed the base weights (:mod:`lorank.lora.initialisation`).
        OptimizerStateError: the optimiser does not hold a parameter, or its state has an unknown shape.
    """
    _check_plan(layers, plan)
    inner = unwrap_optimizer(optimizer) if optimizer is not None else None
    changes = [(i, layers[name], plan[name]) for i, name in enumerate(layers) if name in plan]
    changes = [
        (i, layer, layer_plan)
        for i, layer, layer_plan in changes
        if layer_plan.origins != tuple(range(layer.rank)) or (layer_plan.basis is not None and layer.rank)
    ]
    if changes:
        check_base_unchanged(layers)
    init = layers.config.init_lora_weights
    resized = []
    for index, layer, layer_plan in changes:
        generator = torch.Generator().manual_seed(_combine_seeds(seed, index))
        resized.append(_plan_layer(layer, layer_plan, generator, init, inner, second_moments))
    # Every new tensor exists now. From here on they are only assigned.
    for (_, layer, layer_plan), new in zip(changes, resized, strict=True):
        _assign_layer(layer, layer_plan, new)
    if changes:
        if layers.gates is not None:
            # On their own device, where the method keeps its state, also if the model has moved to another one.
            gates = torch.cat([layer.gate for layer in layers.values()])  # type: ignore[misc]  # all are set
            layers.learn_gates(gates, layers.gates.values.device)
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
        check_basis(layer, layer_plan)
        check_vectors(layer, layer_plan)
        # The user may have made a layer with more than min(d_in, d_out) ranks. Such a layer only cannot grow.
        if layer_plan.add < 0 or (layer_plan.add and layer_plan.rank > layer.max_rank):
            most = "min(d_in, d_out) = " if layer.pool is None else "the reserved "
            raise PlanError(
                f"{name} can hold at most {most}{layer.max_rank} ranks; the plan asks for {layer_plan.rank}"
            )
        if layer_plan.rank < min(layer.min_rank, layer.rank):
            raise PlanError(f"{name} uses {layer.companion}, which needs at least one rank; the plan leaves none")
    if not any(plan[name].rank if name in plan else layer.rank for name, layer in layers.items()):
        raise PlanError("the plan leaves no rank in any module: an adapter without weights cannot be saved or trained")


@dataclass(frozen=True)
class _ResizedLayer:
    """The new tensors of a layer.

    Args:
        A: (r, d_in), or in the layer's own layout.
        B: (d_out, r), or in the layer's own layout.
        grads: the gradients of A and B, or None.
        gate: (r,) or (n, r), or None.
        state_updates: functions that assign the new state of A and B in the optimiser.
    """

    A: Tensor
    B: Tensor
    grads: tuple[Tensor | None, Tensor | None]
    gate: Tensor | None
    state_updates: Sequence[Callable[[], None]]


def _plan_layer(
    layer: AdapterLayer,
    layer_plan: LayerPlan,
    generator: torch.Generator,
    init: Any,
    optimizer: torch.optim.Optimizer | None,
    second_moments: SecondMoments,
) -> _ResizedLayer:
    """Computes all new tensors of a layer. Nothing changes."""
    origins = torch.tensor(layer_plan.origins, dtype=torch.long)
    new = origins < 0  # (r,)
    entries = [axis.expand_origins(origins, layer.rank) for axis in layer.axes]  # of the rank axes of A and B
    basis = layer_plan.basis
    turns = [None if basis is None else axis.expand_turn(basis.turn(axis.axis)) for axis in layer.axes]
    A, B = (
        reindex_ranks(weight.data if turn is None else turn_ranks(weight.data, turn.weight, axis), entries[axis], axis)
        for axis, (weight, turn) in enumerate(zip((layer.A, layer.B), turns, strict=True))
    )  # (r, d_in), (d_out, r)
    if layer_plan.add:
        fresh, rows = _draw_new_vectors(layer, layer_plan, generator, init)  # (add, d)
        axis_A, axis_B = layer.axes
        if rows:
            A[entries[0] < 0] = axis_A.tensor(fresh, A.shape).to(A)  # (copies · add, …)
        else:
            B[:, new] = axis_B.tensor(fresh.T, B.shape).to(B)
    gate = None
    if layer.gate is not None:
        gate = reindex_ranks(layer.gate.detach(), origins, layer.gate.dim() - 1)
        gate[..., new.to(gate.device)] = 1
    grad_A, grad_B = (
        _resized_gradient(parameter.grad, turn, entries[axis], axis)
        for axis, (parameter, turn) in enumerate(zip((layer.A, layer.B), turns, strict=True))
    )
    states = _plan_states(optimizer, layer, entries, (A, B), turns, second_moments)
    return _ResizedLayer(A, B, (grad_A, grad_B), gate, states)


def _resized_gradient(gradient: Tensor | None, turn: Turn | None, entries: Tensor, axis: int) -> Tensor | None:
    if gradient is None:
        return None
    turned = gradient if turn is None else turn_ranks(gradient, turn.gradient, axis)
    return reindex_ranks(turned, entries, axis)


def _plan_states(
    optimizer: torch.optim.Optimizer | None,
    layer: AdapterLayer,
    entries: Sequence[Tensor],
    resized: tuple[Tensor, Tensor],
    turns: Sequence[Turn | None],
    second_moments: SecondMoments,
) -> list[Callable[[], None]]:
    if optimizer is None:
        return []
    held_ids = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for label, parameter in (("lora_A", layer.A), ("lora_B", layer.B)):
        if parameter.requires_grad and id(parameter) not in held_ids:
            raise OptimizerStateError(
                f"the optimiser does not hold {layer.name}.{label}: make it from the PEFT model's parameters, after "
                "get_peft_model, e.g. AdamW(p for p in model.parameters() if p.requires_grad)"
            )
    return [
        plan_state_update(
            optimizer, f"{layer.name}.{label}", weight, axis, entries[axis], data, turns[axis], second_moments
        )
        for axis, (label, weight, data) in enumerate(
            zip(("lora_A", "lora_B"), (layer.A, layer.B), resized, strict=True)
        )
    ]


def _assign_layer(layer: AdapterLayer, layer_plan: LayerPlan, new: _ResizedLayer) -> None:
    layer.gate = None
    replace_data(layer.A, new.A, new.grads[0])
    replace_data(layer.B, new.B, new.grads[1])
    if layer_plan.head_ranks is not None:
        layer.set_heads(layer.groups, layer_plan.head_ranks)
    module, adapter, rank = layer.module, layer.adapter, layer.module_rank(layer_plan.rank)
    layer.note_rank()
    s, live, from_alpha = layer.file_scaling, layer.scaling, layer.scaling_is_from_alpha
    module.r[adapter] = rank
    module.lora_alpha[adapter] = alpha_for(s, rank, layer.use_rslora)
    # PEFT computes the scaling from alpha when it loads a file. The same computation makes both scalings bitwise equal.
    # A scaling that the user has set with set_scale or scale_layer stays; like PEFT, a file does not hold it.
    module.scaling[adapter] = (
        (scaling_of(module.lora_alpha[adapter], rank, layer.use_rslora) or s) if from_alpha else live
    )
    update_plain_lora_hooks(module)
    layer.gate = new.gate
    for update in new.state_updates:
        update()


def _draw_new_vectors(
    layer: AdapterLayer, layer_plan: LayerPlan, generator: torch.Generator, init: Any
) -> tuple[Tensor, bool]:
    """New vectors (add, d), and whether they are rows of A (else columns of B): the plan's, or as PEFT makes them."""
    if layer_plan.vectors is not None:
        return layer_plan.vectors.values[: layer_plan.add], not layer.is_embedding
    if layer.is_embedding:  # PEFT: A = 0, B ~ N(0, 1)
        return torch.randn((layer_plan.add, layer.d_out), generator=generator), False
    width = layer.A.shape[1:].numel()  # d_in, or the width of a head or an expert where each has its own A
    shape = (layer_plan.add, width * layer.axes[0].copies)
    if isinstance(init, str) and init.lower() == "gaussian":  # PEFT: N(0, 1/r)
        return torch.randn(shape, generator=generator) / layer.module_rank(layer_plan.rank), True
    bound = 1 / math.sqrt(width)  # kaiming_uniform_(a=√5) with this number of inputs
    return torch.rand(shape, generator=generator) * (2 * bound) - bound, True


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


def write_patterns(layers: AdapterLayers) -> None:
    """Writes all ranks and alphas to a copy of the live ``LoraConfig``, so that PEFT saves and reloads them exactly.

    PEFT keeps the user's own configuration object in the model. So this object is replaced, never changed.

    The initialisation becomes one with which PEFT loads any ranks (:func:`set_plain_init_`).

    PEFT treats the keys of its patterns as regular expressions that may match the end of a name, and uses the first
    match. So a key is ``^`` and the escaped full name, and every module has a key. A missing alpha would silently load
    a wrong scaling. r = the largest rank and alpha = s·r also make the global values correct, for servers that ignore
    the patterns. PEFT's configuration refuses rank 0, so ``target_modules`` lists only the modules with ranks, and
    states the others (:mod:`lorank.lora.rank_zero`). A parameter at rank 0 has one rank of zeros in the file
    (:mod:`lorank.lora.experts`), so ``target_parameters`` stays as the user gave it.
    """
    config = copy.copy(layers.config)
    set_plain_init_(config)
    alive = {name: layer for name, layer in layers.items() if layer.rank}
    empty = [name for name, layer in layers.items() if name not in alive and not layer.is_expert]
    largest = max(layer.module_rank(layer.rank) for layer in alive.values())
    saved = {f"^{re.escape(name)}": layer for name, layer in layers.items() if name not in empty}
    config.rank_pattern = {key: layer.module_rank(layer.rank) or 1 for key, layer in saved.items()}
    config.alpha_pattern = {
        key: layer.module.lora_alpha[layer.adapter] or alpha_for(layer.file_scaling, 1, layer.use_rslora)
        for key, layer in saved.items()
    }
    config.r = largest
    scalings = {layer.file_scaling for layer in alive.values()}
    if len(scalings) == 1:
        config.lora_alpha = alpha_for(scalings.pop(), largest, config.use_rslora)
    _write_targets(config, layers, [name for name, layer in alive.items() if not layer.is_expert], empty)
    layers.config = config


def _write_targets(config: LoraConfig, layers: AdapterLayers, alive: Collection[str], empty: Collection[str]) -> None:
    """Writes which modules have ranks: as the user named them if that fits, or by full names."""
    for field, value in layers.targets.items():
        setattr(config, field, value)
    # Layers that were found while modules had rank 0 do not know the user's setting, which names these modules too.
    modules = [name for name, layer in layers.items() if not layer.is_expert]
    if not empty and all(check_target_module_exists(config, name) for name in modules):
        return
    entries = target_entries(empty)
    if alive:
        config.target_modules = {*alive, *entries}
    else:  # only parameters have ranks, and PEFT warns of target modules that are not there
        config.target_modules, config.target_parameters = [], [*(config.target_parameters or ()), *entries]
    config.layers_to_transform = config.layers_pattern = None  # full names need no further choice of layers
    if any(check_target_module_exists(config, name) for name in empty):
        # A name in a set also matches a longer name that ends with it. A string must match the whole name.
        config.target_modules = target_pattern(alive, empty)
