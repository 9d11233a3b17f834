"""From an allocation to its line of history."""

from __future__ import annotations

from collections.abc import Mapping

from lorank.allocators import Allocation, Allocator
from lorank.lora import AdapterLayers
from lorank.training.history import Record


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
