"""A form of fixed shape, for owners of parameters that cannot follow a resize: ranks move in a pool.

DeepSpeed copies parameters into flat buffers when its engine is made; their shapes are fixed from then on. So the
model's two parameters of a layer get room for R ranks before that, and hold the r that are there, then zeros:

    stored A = [A; 0]: (R, d_in)        stored B = [B, 0]: (d_out, R)        r ≤ R

A rank whose row of A, column of B and moments are zero is dead: its gradients are exactly zero, and so is what a step
adds, weight decay included. It costs its place in memory and in the product, and nothing else.

Everything in this package sees the r live ranks: :class:`Pool` holds them apart, as parameters of their own that are
resized like any others. Whoever trains the stored ones brings the two together
(:mod:`lorank.training.parallel.deepspeed`).
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

POOLS = "lorank_pools"
"""Where a PEFT layer keeps its pools, by adapter."""


class Pool:
    """The live ranks of one layer, beside its stored parameters.

    Args:
        A: (r, d_in), B: (d_out, r): what the layer has now; copied.
        capacity: R.

    Attributes:
        A, B: parameters that are not the model's.
        capacity: R.
    """

    def __init__(self, A: Tensor, B: Tensor, capacity: int) -> None:
        self.A, self.B = (nn.Parameter(weight.detach().clone()) for weight in (A, B))
        self.capacity = capacity


def pool_of(module: LoraLayer, adapter: str) -> Any:
    """The layer's :class:`Pool`, or None."""
    return vars(module).get(POOLS, {}).get(adapter)


def padded(tensor: Tensor, axis: int, size: int) -> Tensor:
    """A copy of a matrix with zeros behind it, ``size`` long along ``axis``."""
    missing = size - tensor.shape[axis]
    return F.pad(tensor.detach(), (0, 0, 0, missing) if axis == 0 else (0, missing)).contiguous()
