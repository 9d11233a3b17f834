"""The learning rate of the adapter, and the peak of its schedule.

Methods with gates or masks multiply their own step sizes by rate / peak, so that these follow the user's schedule. The
peak is the largest of:

- what the schedule states in the parameter group: ``max_lr`` (OneCycleLR), else ``initial_lr``, which other schedules
  multiply by factors up to 1; without a schedule, the rate when the run was attached;
- the rates of the steps so far, for schedules that go above what they state.

So the factor is never above 1. OneCycleLR's ``initial_lr`` is its first rate, a twenty-fifth of its peak by default.

A method may also multiply the adapter's rate in a step (:class:`ScaledRate`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from lorank.lora import AdapterLayers


def adapter_group(optimizer: torch.optim.Optimizer, layers: AdapterLayers) -> Mapping[str, Any]:
    """The first parameter group that holds a LoRA parameter and trains it, else the first that holds one.

    Args:
        optimizer: the optimiser. It holds the LoRA parameters.
        layers: the LoRA layers.
    """
    ids = {id(weight) for layer in layers.values() for weight in (layer.A, layer.B)}
    groups = [group for group in optimizer.param_groups if any(id(p) in ids for p in group["params"])]
    return next(
        (group for group in groups if stated_peak(group, rate_of(group))), (groups or optimizer.param_groups)[0]
    )


def rate_of(group: Mapping[str, Any]) -> float:
    """The learning rate of a parameter group. 0 if the optimiser has none."""
    return float(group.get("lr") or 0.0)


def stated_peak(group: Mapping[str, Any], first_rate: float) -> float:
    """The peak that the schedule states.

    Args:
        group: the parameter group.
        first_rate: the rate when the run was attached, for a group without a schedule.
    """
    return float(group.get("max_lr") or group.get("initial_lr") or first_rate)


class ScaledRate:
    """Multiplies the learning rate of A and B for the time of one step.

    Schedules read and change the optimiser's rate between steps, where it is always the user's. Other weights keep
    their rate: a group that holds a classifier's head beside the adapter is two groups during the step. A step that
    fails may leave its rate and its groups, until the next one begins or the run ends; a rate that was set in between
    is then left alone.

    Args:
        optimizer: the optimiser.
        layers: the LoRA layers.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, layers: AdapterLayers) -> None:
        self._optimizer, self._layers = optimizer, layers
        self._before: list[tuple[dict[str, Any], Any, Any]] = []  # group, rate before and in the step
        self._divided: list[tuple[dict[str, Any], Any, dict[str, Any]]] = []  # group, its parameters, group of the rest

    def multiply(self, factor: float) -> None:
        """Multiplies the rates by ``factor``, until :meth:`restore`. Optimisers without a rate are left alone."""
        self.restore()
        if factor == 1:
            return
        for group in self._groups():
            if group.get("lr") is not None:
                before, group["lr"] = group["lr"], group["lr"] * factor
                self._before.append((group, before, group["lr"]))

    def _groups(self) -> list[dict[str, Any]]:
        """The groups with A and B, and with nothing else if groups can be divided."""
        own: list[dict[str, Any]] | None = getattr(self._optimizer, "rate_groups", None)
        if own is not None:  # it stands for another optimiser, which makes the steps, often on one flat tensor
            return own
        ids = {id(weight) for layer in self._layers.values() for weight in (layer.A, layer.B)}
        groups = [group for group in self._optimizer.param_groups if any(id(p) in ids for p in group["params"])]
        for group in groups:
            others = [p for p in group["params"] if id(p) not in ids]
            if others and group.get("lr") is not None:
                rest = {**group, "params": others}
                self._divided.append((group, group["params"], rest))
                group["params"] = [p for p in group["params"] if id(p) in ids]
                self._optimizer.param_groups.append(rest)
        return groups

    def restore(self) -> None:
        """Gives every group its own rate and parameters again."""
        for group, before, scaled in self._before:
            if group["lr"] is scaled:
                group["lr"] = before
        for group, params, rest in self._divided:
            group["params"] = params
            self._optimizer.param_groups[:] = [other for other in self._optimizer.param_groups if other is not rest]
        self._before, self._divided = [], []
