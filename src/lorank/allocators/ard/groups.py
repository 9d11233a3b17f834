"""ARD-LoRA's groups, in the layers' order. A group is one attention head, or a whole layer without heads."""

from __future__ import annotations

import torch
from torch import Tensor

from lorank.allocators.base import TrainingInfo
from lorank.errors import ScheduleError
from lorank.lora import AdapterLayers


def group_sizes(layers: AdapterLayers) -> dict[str, int]:
    """Per layer, the number of groups: its number of heads, or one."""
    return {name: len(layer.head_ranks) for name, layer in layers.items()}


def group_owners(layers: AdapterLayers) -> list[str]:
    """The name of the layer of every group, a list of length G."""
    return [name for name, size in group_sizes(layers).items() for _ in range(size)]


def stored_counts(layers: AdapterLayers) -> Tensor:
    """The number of stored ranks of each group, (G,) int64."""
    return torch.tensor([rank for layer in layers.values() for rank in layer.head_ranks], dtype=torch.long)


def group_caps(layers: AdapterLayers) -> Tensor:
    """The highest possible rank of each group, (G,) int64."""
    caps = [
        layer.max_rank if layer.groups is None else layer.groups.capacity(layer.d_in, layer.d_out)
        for layer in layers.values()
        for _ in layer.head_ranks
    ]
    return torch.tensor(caps, dtype=torch.long)


def base_ranks(layers: AdapterLayers, run: TrainingInfo, r0: int | None) -> Tensor:
    """r0 of every group, (G,) float64: ``r0`` if given, else the layer's initial rank, limited by the group's cap.

    Raises:
        ScheduleError: ``r0`` is given and above the cap of a group.
    """
    made, owners, caps = run.initial_ranks or layers.ranks, group_owners(layers), group_caps(layers)
    wanted = torch.tensor([float(made[name] if r0 is None else r0) for name in owners], dtype=torch.float64)
    over = (wanted > caps).nonzero()
    if r0 is not None and len(over):
        first = int(over[0])
        raise ScheduleError(
            f"ARDLoRA(r0={r0}): a group of {owners[first]} can hold at most {int(caps[first])} ranks (the width of a "
            "head, or min(d_in, d_out)): give a smaller r0, or heads='module'"
        )
    return torch.minimum(wanted, caps.double())
