"""The runs of this process: which adapters have a run now, and how runs began that stopped before their end.

An adapter has one run at a time: two runs would both move its ranks. So has an optimiser, because the rank state of a
run is saved inside the optimiser's state. The adapter is identified by its Parameters, whichever wrapper of the model
the user gave.

A run that stops before its last decision (an interrupt, an exception, a retry with a smaller batch) has already moved
ranks. The next run of the same adapter is a retry: it must have the budget of the first run, not half of what is left.
So the beginning of every run is remembered until the run has finished.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch.utils.weak import WeakIdKeyDictionary

from lorank.errors import LorankError
from lorank.lora import AdapterLayers, HeadGroups


@dataclass(frozen=True)
class RunBeginning:
    """How a run began.

    Args:
        method: the method and its settings (:meth:`lorank.allocators.Allocator.describe`).
        initial_ranks: per module, the rank that the adapter was made with.
        heads: per module in per-head form, its heads and their ranks when the run was detached.
    """

    method: Mapping[str, Any] = field(default_factory=dict)
    initial_ranks: Mapping[str, int] = field(default_factory=dict)
    heads: Mapping[str, tuple[HeadGroups, tuple[int, ...]]] = field(default_factory=dict)


class AttachedRun(Protocol):
    """A run with its hooks in place."""

    @property
    def layers(self) -> AdapterLayers: ...

    @property
    def optimizer(self) -> torch.optim.Optimizer: ...

    @property
    def step(self) -> int: ...

    @property
    def finished(self) -> bool: ...

    def detach(self) -> None: ...


_attached: weakref.WeakSet[Any] = weakref.WeakSet()
# By the Parameters A of an adapter, which a resize keeps. Nothing here keeps a model alive.
_beginnings: Any = WeakIdKeyDictionary()


def add(run: AttachedRun) -> None:
    """Notes that ``run`` is attached to its layers and its optimiser."""
    _attached.add(run)


def remove(run: AttachedRun) -> None:
    """Notes that ``run`` is detached."""
    _attached.discard(run)


def remember_beginning(layers: AdapterLayers, beginning: RunBeginning) -> None:
    """Notes how the run of these layers began, until :func:`forget_beginning`."""
    for layer in layers.values():
        _beginnings[layer.A] = beginning


def forget_beginning(layers: AdapterLayers) -> None:
    """Notes that the run of these layers has carried out its last decision: the next run is a new one."""
    for layer in layers.values():
        _beginnings.pop(layer.A, None)


def interrupted_beginning(layers: AdapterLayers) -> RunBeginning | None:
    """How the last run of these layers began, if it did not come to its end; else None."""
    found = [_beginnings.get(layer.A) for layer in layers.values()]
    first = found[0]
    if first is None or any(other is not first for other in found) or first.initial_ranks.keys() != layers.keys():
        return None
    assert isinstance(first, RunBeginning)
    return first


def attached_to(layers: AdapterLayers, optimizer: Any) -> Iterator[AttachedRun]:
    """The attached runs that have a Parameter of ``layers``, or ``optimizer`` or the one inside its wrapper."""
    for run in list(_attached):
        if _shares_adapter(run, layers) or shares_optimizer(run, optimizer):
            yield run


def shares_optimizer(run: AttachedRun, optimizer: Any) -> bool:
    """Whether ``run`` steps with ``optimizer`` or the one inside its wrapper."""
    return bool(_inner_ids(optimizer) & _inner_ids(run.optimizer))


def _shares_adapter(run: AttachedRun, layers: AdapterLayers) -> bool:
    parameters = {id(layer.A) for layer in layers.values()}
    return any(id(layer.A) in parameters for layer in run.layers.values())


def require_detached(layers: AdapterLayers, optimizer: Any, *, replace: bool) -> None:
    """Detaches the finished runs of ``layers`` and of ``optimizer``, and with ``replace`` the others too.

    Args:
        layers: the layers of a run that is to begin.
        optimizer: its optimiser, also inside wrappers.
        replace: whether a run that has not finished is detached; otherwise it is refused.

    Raises:
        LorankError: there is a run that has not finished, and ``replace`` is False. Nothing has changed.
    """
    runs = list(attached_to(layers, optimizer))
    unfinished = [run for run in runs if not run.finished]
    if unfinished and not replace:
        raise LorankError(_refusal(layers, unfinished[0]))
    for run in runs:
        run.detach()


def _refusal(layers: AdapterLayers, run: AttachedRun) -> str:
    end = "end it with ranks.detach(), where ranks is what attach returned (of a RankCallback: callback.ranks)"
    if _shares_adapter(run, layers):
        return (
            f"the adapter {layers.adapter!r} has a run already, at step {run.step}, and two runs would both move its "
            f"ranks: {end}, or let the new run take its place with attach(…, replace=True)"
        )
    return (
        f"the optimiser has a run already, of the adapter {run.layers.adapter!r}, and holds the state of one run only: "
        f"make an optimiser for each adapter, or {end}"
    )


def _inner_ids(optimizer: Any) -> set[int]:
    """The identities of an optimiser and of the optimisers inside its wrappers."""
    found: set[int] = set()
    while optimizer is not None and id(optimizer) not in found:
        found.add(id(optimizer))
        optimizer = getattr(optimizer, "optimizer", None)
    return found
