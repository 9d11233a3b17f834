"""From an allocation to its line of history."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch

from lorank.allocators import Allocation, Allocator
from lorank.lora import AdapterLayers
from lorank.training.history import Record

logger = logging.getLogger("lorank")


def record_of(
    step: int,
    allocator: Allocator,
    layers: AdapterLayers,
    allocation: Allocation,
    before: Mapping[str, int],
    seconds: float,
) -> Record:
    """The record of an allocation that has been carried out.

    Args:
        before: the ranks before it.
        seconds: what it took.
    """
    plan = allocation.plan
    pruned = {name: sorted(set(range(before[name])) - set(change.keep)) for name, change in plan.items()}
    active = dict(allocation.active)
    if not active and layers.gates is not None:
        active = {name: int(leaf.count_nonzero()) for name, leaf in layers.gates.leaves.items()}
    return Record(
        step=step,
        method=type(allocator).__name__,
        ranks=layers.ranks,
        shapes={name: (layer.d_in, layer.d_out) for name, layer in layers.items()},
        pruned={name: gone for name, gone in pruned.items() if gone},
        added={name: change.add for name, change in plan.items() if change.add},
        scores={name: values.tolist() for name, values in allocation.scores.items()},
        seconds=seconds,
        details=dict(allocation.details),
        active=active,
    )


def tell(record: Record) -> None:
    """An allocation's line in the log."""
    moved = sum(map(len, record.pruned.values()))
    logger.info("step %d: %d ranks moved, %d in %d modules", record.step, moved, record.total_rank, len(record.ranks))


def learning_rates(optimizer: torch.optim.Optimizer) -> tuple[float, float]:
    """The first parameter group's learning rate now, and the peak that its schedule multiplies."""
    group = optimizer.param_groups[0]
    lr = float(group.get("lr") or 0.0)
    return lr, float(group.get("initial_lr") or optimizer.defaults.get("lr") or lr)
