"""ARD-LoRA's groups: the heads of every layer that has some, and every other layer as a whole, in the layers' order."""

from __future__ import annotations

import torch
from torch import Tensor

from lorank.allocators.base import TrainingInfo
from lorank.errors import ScheduleError
from lorank.lora import AdapterLayers


def group_sizes(layers: AdapterLayers) -> dict[str, int]:
    """How many groups each layer has: its heads, or one."""
    return {name: len(layer.head_ranks) for name, layer in layers.items()}


def group_owners(layers: AdapterLayers) -> list[str]:
    """Of every group, its layer, (G,)."""
    return [name for name, size in group_sizes(layers).items() for _ in range(size)]


def stored_counts(layers: AdapterLayers) -> Tensor:
    """(G,) int64: the ranks that each group has physically."""
    return torch.tensor([rank for layer in layers.values() for rank in layer.head_ranks], dtype=torch.long)


def group_caps(layers: AdapterLayers) -> Tensor:
    """(G,) int64: the most ranks that each group can hold."""
    caps = [
        layer.max_rank if layer.groups is None else layer.groups.capacity(layer.d_in, layer.d_out)
        for layer in layers.values()
        for _ in layer.head_ranks
    ]
    return torch.tensor(caps, dtype=torch.long)


def base_ranks(layers: AdapterLayers, run: TrainingInfo, r0: int | None) -> Tensor:
    """r0 of every group, (G,) float64: as given, or the rank that the adapter was made with, at most what it can hold.

    Raises:
        ScheduleError: a group cannot hold the ``r0`` that is given.
    """
    made, owners, caps = run.initial_ranks or layers.ranks, group_owners(layers), group_caps(layers)
    wanted = torch.tensor([float(made[name] if r0 is None else r0) for name in owners], dtype=torch.float64)
    over = (wanted > caps).nonzero()
    if r0 is not None and len(over):
        first = int(over[0])
        raise ScheduleError(
            f"ARDLoRA(r0={r0}): a group of {owners[first]} can hold at most {int(caps[first])} ranks (the width of a "
            "head, or min(d_in, d_out)): name a smaller r0, or heads='module'"
        )
    return torch.minimum(wanted, caps.double())
