"""Adam (Kingma & Ba, ICLR 2015) for gates, which are not parameters of the user's optimiser.

It computes the same numbers as ``torch.optim.Adam`` (AdamW without weight decay). The moments are in the allocator's
state, so they are saved with it and reindexed after a resize.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lorank.lora.rank_index import reindex_ranks
from lorank.scoring.context import State

BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8
"""PyTorch's defaults."""

_MEAN, _SQUARE, _STEP = "adam.mean", "adam.square", "adam.step"


def start_adam(values: Tensor) -> State:
    """Moments of zero for ``values``, (R,), on the same device. The number of steps is counted on the CPU."""
    return {
        _MEAN: torch.zeros_like(values),
        _SQUARE: torch.zeros_like(values),
        _STEP: torch.zeros((), dtype=torch.long),
    }


@torch.no_grad()
def adam_step_(values: Tensor, grad: Tensor, state: State, lr: float) -> None:
    """One step of ``values``, (R,), in place.

    Args:
        grad: ∂L/∂values, (R,).
        state: includes the tensors of :func:`start_adam`; they are changed in place.
        lr: the learning rate of this step.
    """
    state[_STEP] += 1
    step = int(state[_STEP])
    mean, square = state[_MEAN], state[_SQUARE]
    mean.lerp_(grad, 1 - BETA1)
    square.mul_(BETA2).addcmul_(grad, grad, value=1 - BETA2)
    denominator = (square.sqrt() / math.sqrt(1 - BETA2**step)).add_(EPSILON)
    values.addcdiv_(mean, denominator, value=-lr / (1 - BETA1**step))


def resize_adam_(state: State, origins: Tensor) -> None:
    """Reindexes the moments after a resize: kept ranks keep their moments, those of new ranks start at zero."""
    for name in (_MEAN, _SQUARE):
        state[name] = reindex_ranks(state[name], origins)
