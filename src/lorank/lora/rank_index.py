"""Whatever is kept per rank outside a layer (scores, moments of a gate) follows a resize."""

from __future__ import annotations

from torch import Tensor


def follow(values: Tensor, origins: Tensor, axis: int = 0) -> Tensor:
    """A copy of something kept per rank, after a resize: kept ranks keep theirs, new ones have zeros.

    Args:
        values: the axis named ``axis`` counts the ranks before.
        origins: (ranks after,) int64, where each one was before, or −1 (:func:`lorank.lora.taken`).
    """
    origins = origins.to(values.device)
    moved = values.new_zeros([*values.shape[:axis], len(origins), *values.shape[axis + 1 :]])
    old = (origins >= 0).nonzero().squeeze(1)
    return moved.index_copy(axis, old, values.index_select(axis, origins[old]))
