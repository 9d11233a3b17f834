"""Tries, after an optimiser's first step, whether its state can follow a change of ranks.

For every optimiser the new state of each layer is computed once, and not assigned. An optimiser for which there is no
rule (:mod:`lorank.lora.optimizer_rules`) must also show, on copies of one weight:

1. The state of the weight is where lorank looks for it, ``optimizer.state[weight]``, and holds numbers and tensors.
2. In a step with a zero gradient, the entries of a weight without state stay zero. So zero is right for a new rank. A
   copy of the weights, a step size or a constant shows itself here.
3. A weight whose ranks have changed, with its state, takes a step; an empty weight without a gradient does no harm.

What cannot be shown is refused, now and not when ranks move for the first time.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lorank.errors import OptimizerStateError
from lorank.lora.layer import AdapterLayers
from lorank.lora.optimizer_rules import ADVICE, find_rule
from lorank.lora.optimizer_state import plan_state_update
from lorank.lora.rank_index import reindex_ranks

TINY = 1e-12  # AdaBelief adds its ε to a moment in every step


@torch.no_grad()
def try_optimizer(optimizer: torch.optim.Optimizer, layers: AdapterLayers) -> None:
    """Checks an optimiser that has done at least one step. Nothing changes.

    Args:
        optimizer: the torch optimiser, without accelerate's wrapper.
        layers: the LoRA layers.

    Raises:
        OptimizerStateError: its state cannot follow a change of ranks, or this cannot be shown.
    """
    weights = [
        (f"{layer.name}.{label}", weight, axis)
        for layer in layers.values()
        for label, weight, axis in (("lora_A", layer.A, 0), ("lora_B", layer.B, 1))
        if weight.requires_grad
    ]
    for name, weight, axis in weights:
        origins = torch.tensor([*range(weight.shape[axis]), -1])
        plan_state_update(optimizer, name, weight, axis, origins, reindex_ranks(weight.detach(), origins, axis))
    kind = type(optimizer).__name__
    trained = [item for item in weights if item[1].numel() and item[1].grad is not None]
    if find_rule(optimizer) is not None:
        missing = [name for name, weight, _ in trained if not optimizer.state.get(weight)]
        if missing and not isinstance(optimizer, torch.optim.SGD):  # without momentum, SGD has no state
            raise OptimizerStateError(
                f"{kind} has no state for {missing[0]} after a step with its gradient, so another optimiser steps it. "
                "Attach to that one"
            )
        return
    trained = trained or [item for item in weights if item[1].numel()]
    if not trained:
        return
    refusal = f"lorank does not know the optimiser {kind}, and"
    _check_place(optimizer, trained, refusal)
    name, weight, axis = min(trained, key=lambda item: item[1].numel())
    try:
        fault = _find_fault(optimizer, weight, axis)
    except Exception as error:
        fault = f"a step with it fails on a copy whose ranks have changed ({type(error).__name__}: {error})"
    if fault:
        raise OptimizerStateError(f"{refusal} {fault}, tried with {name} after the first step. {ADVICE}")


def _check_place(optimizer: torch.optim.Optimizer, trained: list[tuple[str, nn.Parameter, int]], refusal: str) -> None:
    """Raises unless the state of each weight is in ``optimizer.state`` under the weight, or there is none at all."""
    outside = [
        label
        for label, value in vars(optimizer).items()
        if label not in ("state", "param_groups") and any(tensor.numel() > 1 for tensor in _tensors(value))
    ]
    for group in optimizer.param_groups:
        outside += [key for key in group if key != "params" and any(t.numel() > 1 for t in _tensors(group[key]))]
    missing = [name for name, weight, _ in trained if not optimizer.state.get(weight)]
    if outside or (missing and optimizer.state):
        place = f"keeps tensors in {outside[0]!r}" if outside else f"keeps no state under the parameter {missing[0]}"
        raise OptimizerStateError(f"{refusal} it {place}: a change of ranks would not reach all of its state. {ADVICE}")


def _tensors(value: Any, depth: int = 3) -> Iterator[Tensor]:
    """All tensors in nested containers, objects and modules."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, nn.Module):
        yield from value.parameters()
    elif depth and isinstance(value, Mapping | list | tuple | set):
        for item in [*value, *value.values()] if isinstance(value, Mapping) else value:
            yield from _tensors(item, depth - 1)
    elif depth and hasattr(value, "__dict__") and not callable(value):
        yield from _tensors(vars(value), depth - 1)


def _find_fault(optimizer: torch.optim.Optimizer, weight: nn.Parameter, axis: int) -> str | None:
    """What speaks against a resize of this optimiser's state, as a verb phrase; or None."""
    state = optimizer.state.get(weight, {})
    odd = [key for key, value in state.items() if not isinstance(value, Tensor | int | float | str | None)]
    if odd or any(isinstance(value, Tensor) and type(value) is not Tensor for value in state.values()):
        return f"its state has entries of unknown kinds ({', '.join(map(repr, odd or state))})"

    # B may still be zero, where a copy of it would not show itself.
    values = torch.linspace(1, 2, weight.numel(), dtype=weight.dtype, device=weight.device).reshape(weight.shape)
    new, entries = _step(optimizer, weight, values, {}, torch.zeros_like(weight))
    for key, value in entries.items():
        if isinstance(value, Tensor) and value.shape == weight.shape and bool((~(value.abs() <= TINY)).any()):
            what = "a copy of the weights" if torch.equal(value, new.detach().to(value)) else "not zero"
            return (
                f"its state {key!r} of a weight without a gradient is {what}, so lorank cannot begin it for new ranks"
            )
    if entries.keys() != state.keys():
        return f"its state has other entries ({', '.join(map(repr, entries.keys() ^ state.keys()))}) in another step"

    origins = torch.tensor([-1, *range(1, weight.shape[axis]), -1])  # one rank leaves, two begin
    gradient = torch.zeros_like(weight) if weight.grad is None else weight.grad
    for chosen in (origins, origins[:0]):
        data = reindex_ranks(weight.detach(), chosen, axis)
        resized = _copy_without_state(optimizer, optimizer.param_groups)
        if state:
            resized.state[weight] = copy.deepcopy(dict(state))
        plan_state_update(resized, "the copy", weight, axis, chosen, data)()
        grad = reindex_ranks(gradient, chosen, axis) if data.numel() else None
        moved, _ = _step(optimizer, weight, data, resized.state[weight], grad)
        if not bool(moved.isfinite().all()):
            return "a step with it gives NaN on a copy whose ranks have changed"
    return None


def _step(
    optimizer: torch.optim.Optimizer, weight: nn.Parameter, data: Tensor, state: dict[str, Any], grad: Tensor | None
) -> tuple[nn.Parameter, dict[str, Any]]:
    """One step of a copied optimiser for one weight: the weight after it, and its state.

    Args:
        weight: the real weight, whose parameter group is copied.
        data: the value of the copied weight. It is changed.
        state: the state of the copied weight. It is changed.
        grad: the gradient of the copied weight, or None.
    """
    parameter = nn.Parameter(data)
    parameter.grad = grad
    group = next(group for group in optimizer.param_groups if any(p is weight for p in group["params"]))
    index = next(i for i, p in enumerate(group["params"]) if p is weight)
    count = len(group["params"])
    own: dict[str, Any] = {
        key: copy.deepcopy([value[index]] if isinstance(value, list) and len(value) == count else value)
        for key, value in group.items()
        if key != "params"
    }
    if "weight_decay" in own:
        own["weight_decay"] = 0.0  # its gradient is not zero
    trial = _copy_without_state(optimizer, [{"params": [parameter], **own}])
    if state:
        trial.state[parameter] = state
    devices = [parameter.device] if parameter.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.enable_grad():
        trial.step()
    return parameter, dict(trial.state.get(parameter, {}))


def _copy_without_state(optimizer: torch.optim.Optimizer, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """A copy of the optimiser without hooks and without the ``step`` that schedulers put on the instance."""
    made: torch.optim.Optimizer = type(optimizer).__new__(type(optimizer))
    vars(made).update(
        {
            key: value if callable(value) else copy.deepcopy(value)
            for key, value in vars(optimizer).items()
            if key not in ("state", "param_groups", "step") and not key.endswith("_hooks")
        }
    )
    made.__setstate__({"state": defaultdict(dict), "param_groups": groups})
    return made
