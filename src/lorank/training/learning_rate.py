"""The learning rate of the adapter, and the peak of its schedule.

Methods with gates or masks multiply their own step sizes by rate / peak, so that these follow the user's schedule. The
peak is the largest of:

- what the schedule states in the parameter group: ``max_lr`` (OneCycleLR), else ``initial_lr``, which other schedules
  multiply by factors up to 1; without a schedule, the rate when the run was attached;
- the rates of the steps so far, for schedules that go above what they state.

So the factor is never above 1. OneCycleLR's ``initial_lr`` is its first rate, a twenty-fifth of its peak by default.
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
