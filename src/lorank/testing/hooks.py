"""Something around every call of a method's hooks: what a hook must not touch is looked at before and after."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import wraps
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import nn

from lorank.allocators import Allocator, Context
from lorank.lora import AdapterLayers

HOOKS = (
    "heads_of",
    "resolve_budget",
    "initial_plan",
    "start",
    "before_step",
    "after_step",
    "due",
    "allocate",
    "after_resize",
    "finish",
)
"""In the order in which a run calls them."""

MOVES_WEIGHTS = ("start", "after_step")
"""Hooks that may write to weights: to draw a new adapter's directions, and for a proximal step."""

Around = Callable[[str, Any], AbstractContextManager[None]]
"""From the name of a hook and its first argument (layers, a context or a step) to what stands around the call."""


@contextmanager
def around_hooks(kind: type[Allocator], around: Around) -> Iterator[None]:
    """While it lasts, every hook of the class is called inside ``around(name, first argument)``."""
    with ExitStack() as stack:
        for name in HOOKS:
            stack.enter_context(patch.object(kind, name, _watched(name, getattr(kind, name), around)))
        yield


def _watched(name: str, hook: Callable[..., Any], around: Around) -> Callable[..., Any]:
    @wraps(hook)
    def watched(self: Allocator, first: Any, *others: Any, **named: Any) -> Any:
        with around(name, first):
            return hook(self, first, *others, **named)

    return watched


@contextmanager
def weights_stay(hook: str, first: Any) -> Iterator[None]:
    """Raises AssertionError where a hook changes the model: weights, buffers, what is trained, the mode."""
    model = _model_of(first)
    if model is None or hook in MOVES_WEIGHTS:
        yield
        return
    before = _snapshot(model)
    yield
    after = _snapshot(model)
    changed = [name for name in before if name not in after or not _equal(before[name], after[name])]
    changed += [name for name in after if name not in before]
    if changed:
        raise AssertionError(
            f"{hook} changed the model: {', '.join(changed[:5])}{', …' if len(changed) > 5 else ''}. A hook decides "
            "and lorank carries it out: return ranks in a plan instead of writing to A and B, look at weights through "
            ".detach(), and put back what scoring changes. Weights may be written in start and after_step alone"
        )


@contextmanager
def random_numbers_stay(hook: str, first: Any) -> Iterator[None]:
    """Raises AssertionError where a hook uses the global generators of PyTorch, NumPy or Python."""
    before = _random_state()
    yield
    changed = [name for name, state in _random_state().items() if not _equal(state, before[name])]
    if changed:
        raise AssertionError(
            f"{hook} used or changed the global random state of {' and '.join(changed)}, on which dropout and the "
            "order of the user's data rest. Draw from a generator of your own: "
            "torch.Generator().manual_seed(run.seed * 1_000_003 + step)"
        )


@contextmanager
def other_random_numbers(hook: str, first: Any) -> Iterator[None]:
    """Another global random state while the hook runs, and the former one afterwards."""
    states = _random_state()
    torch.default_generator.manual_seed(987_654_321)
    np.random.seed(987_654_321)  # noqa: NPY002  # the global state is the point
    random.seed(987_654_321)
    try:
        yield
    finally:
        torch.set_rng_state(states["PyTorch"])
        np.random.set_state(states["NumPy"])  # noqa: NPY002
        random.setstate(states["Python"])


def _model_of(first: Any) -> nn.Module | None:
    return first.model if isinstance(first, Context | AdapterLayers) else None


def _snapshot(model: nn.Module) -> dict[str, Any]:
    # Parameters and buffers, and not the state dict, which shows B multiplied by the gates; those may change.
    found: dict[str, Any] = {}
    for name, parameter in model.named_parameters():
        found[name] = parameter.detach().clone()
        found[f"{name} (requires_grad)"] = parameter.requires_grad
    found |= {name: buffer.clone() for name, buffer in model.named_buffers()}
    return found | {f"{name or 'model'} (training)": module.training for name, module in model.named_modules()}


def _equal(first: Any, second: Any) -> bool:
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, np.ndarray):
        return np.array_equal(first, second)
    if isinstance(first, tuple):
        return all(map(_equal, first, second))
    return bool(first == second)


def _random_state() -> dict[str, Any]:
    return {
        "PyTorch": torch.get_rng_state(),
        "NumPy": np.random.get_state(),  # noqa: NPY002  # the global state is the point
        "Python": random.getstate(),
    }
