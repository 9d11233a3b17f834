"""Pools: stored parameters of fixed shape that hold a variable number of live ranks, for DeepSpeed's ZeRO.

DeepSpeed copies parameters into flat buffers when its engine is made, and their shapes are fixed from then on. So
before that, the two stored parameters of each layer are padded to R ranks. They hold the r live ranks, then zeros:

    stored A = [A; 0]: (R, d_in)        stored B = [B, 0]: (d_out, R)        r ≤ R

A rank is dead if its row of A, its column of B and its moments are zero. The gradients of a dead rank are exactly zero,
and so are its updates, including weight decay. It costs only memory and its part of the matrix product.

The rest of the package works with the r live ranks. :class:`Pool` holds them in separate parameters, which are resized
like any others. :mod:`lorank.training.parallel.deepspeed` copies between the stored and the live parameters.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

POOLS = "lorank_pools"
"""The attribute of a PEFT layer that holds its pools, by adapter."""


class Pool:
    """The live ranks of one layer, separate from its stored parameters.

    Args:
        A: (r, d_in), B: (d_out, r): the layer's present weights; they are copied.
        capacity: R, the number of ranks that the stored parameters can hold. ≥ r.

    Attributes:
        A, B: the live weights. They are not among the model's parameters.
        capacity: R.
    """

    def __init__(self, A: Tensor, B: Tensor, capacity: int) -> None:
        self.A, self.B = (nn.Parameter(weight.detach().clone()) for weight in (A, B))
        self.capacity = capacity


def pool_of(module: LoraLayer, adapter: str) -> Any:
    """The layer's :class:`Pool`, or None."""
    return vars(module).get(POOLS, {}).get(adapter)


def padded(tensor: Tensor, axis: int, size: int) -> Tensor:
    """A copy of a matrix, padded with zeros at the end of ``axis`` (0 or 1) to length ``size``."""
    added = size - tensor.shape[axis]
    return F.pad(tensor.detach(), (0, 0, 0, added) if axis == 0 else (0, added)).contiguous()
