"""Context managers around every call of a method's hooks. They check that a hook does not change what it must not."""

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
    "try_out",
    "before_step",
    "lr_factor",
    "after_step",
    "due",
    "allocate",
    "after_resize",
    "finish",
)
"""The hooks, in the order in which a run calls them."""

MOVES_WEIGHTS = ("start", "after_step")
"""Hooks that may write to weights: ``start`` to draw a new adapter's vectors, ``after_step`` for a proximal step."""

Around = Callable[[str, Any], AbstractContextManager[None]]
"""A function from a hook's name and its first argument (layers, a context or a step) to the context manager around the
call."""


@contextmanager
def around_hooks(kind: type[Allocator], around: Around) -> Iterator[None]:
    """Inside, every hook of the class is called inside ``around(name, first argument)``."""
    with ExitStack() as stack:
        for name in HOOKS:
            stack.enter_context(patch.object(kind, name, _wrapped(name, getattr(kind, name), around)))
        yield


def _wrapped(name: str, hook: Callable[..., Any], around: Around) -> Callable[..., Any]:
    @wraps(hook)
    def wrapped(self: Allocator, first: Any, *others: Any, **named: Any) -> Any:
        with around(name, first):
            return hook(self, first, *others, **named)

    return wrapped


@contextmanager
def weights_unchanged(hook: str, first: Any) -> Iterator[None]:
    """Raises AssertionError if a hook changes the model's weights, buffers, ``requires_grad`` or training mode."""
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
            f"{hook} changed the model: {', '.join(changed[:5])}{', …' if len(changed) > 5 else ''}. A hook returns a "
            "plan, and lorank carries it out: do not write to A and B, read weights through .detach(), and restore "
            "everything that scoring changes. Only start and after_step may write to weights"
        )


@contextmanager
def random_state_unchanged(hook: str, first: Any) -> Iterator[None]:
    """Raises AssertionError if a hook uses the global random generators of PyTorch, NumPy or Python."""
    before = _random_state()
    yield
    changed = [name for name, state in _random_state().items() if not _equal(state, before[name])]
    if changed:
        raise AssertionError(
            f"{hook} used or changed the global random state of {' and '.join(changed)}, which determines dropout and "
            "the order of the user's data. Draw random numbers from a separate generator: "
            "torch.Generator().manual_seed(run.seed * 1_000_003 + step)"
        )


@contextmanager
def with_other_random_state(hook: str, first: Any) -> Iterator[None]:
    """Sets another global random state while the hook runs, and restores the previous state afterwards."""
    states = _random_state()
    torch.default_generator.manual_seed(987_654_321)
    np.random.seed(987_654_321)  # noqa: NPY002  # the global state is the point
    random.seed(987_654_321)
    try:
        yield
    finally:
        torch.set_rng_state(states["PyTorch"])
        np.random.set_state(states["NumPy"])  # noqa: NPY002  # the global state is the point
        random.setstate(states["Python"])


def _model_of(first: Any) -> nn.Module | None:
    return first.model if isinstance(first, Context | AdapterLayers) else None


def _snapshot(model: nn.Module) -> dict[str, Any]:
    # Parameters and buffers instead of the state dict: there B is multiplied by the gates, which may change.
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
