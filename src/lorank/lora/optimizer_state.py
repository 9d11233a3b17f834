"""How an optimiser's state follows a parameter whose rank axis changes.

Two phases, so that a state of unknown shape stops the resize before anything has moved: :func:`plan_state` looks and
raises, the returned function acts.

- A tensor of the parameter's own shape (Adam's and SGD's moments, amsgrad, Lion, …) is indexed on the rank axis.
- A scalar (Adam's step) stays.
- Adafactor's factored second moment, in torch's and in transformers' layout, is indexed where it kept the rank axis.
- bitsandbytes' 8-bit moments are dequantised, indexed and requantised block by block.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from lorank.errors import OptimizerStateError
from lorank.lora.rank_index import reindex_ranks

# Factored moments: name → (the axis that was averaged away, whether it is still there with size 1).
FACTORED = {
    "row_var": (-1, True),  # torch.optim.Adafactor
    "col_var": (-2, True),
    "exp_avg_sq_row": (-1, False),  # transformers.Adafactor
    "exp_avg_sq_col": (-2, False),
}

# bitsandbytes' blockwise 8-bit moments: values → (scales, code).
EIGHT_BIT = {"state1": ("absmax1", "qmap1"), "state2": ("absmax2", "qmap2")}
_EIGHT_BIT_PARTS = {name for parts in EIGHT_BIT.values() for name in parts}
EIGHT_BIT_BLOCK = 256


def unwrap_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """The torch optimiser inside accelerate's wrapper, or the optimiser itself.

    Raises:
        OptimizerStateError: it is not a ``torch.optim.Optimizer``.
    """
    inner = optimizer
    while not _owns_state(inner) and hasattr(inner, "optimizer"):
        inner = inner.optimizer
    if not isinstance(inner, torch.optim.Optimizer):
        raise OptimizerStateError(
            f"expected a torch.optim.Optimizer (or accelerate's wrapper of one), got {type(optimizer).__name__}"
        )
    return inner


def _owns_state(optimizer: Any) -> bool:
    return isinstance(optimizer, torch.optim.Optimizer) and "state" in vars(optimizer)


def check_state(optimizer: torch.optim.Optimizer, name: str, parameter: Tensor) -> None:
    """Raises OptimizerStateError if the state of ``parameter`` has a shape that does not fit it.

    A fused optimiser accepts such a state silently, or crashes the process, so this runs after every resize.
    """
    _plan(optimizer.state.get(parameter, {}), name, parameter, axis=0, origins=torch.arange(0))


def plan_state(
    optimizer: torch.optim.Optimizer, name: str, parameter: Tensor, axis: int, origins: Tensor
) -> Callable[[], None]:
    """Looks at the state of ``parameter`` and returns a function that makes it follow a resize.

    Args:
        name: the parameter's name, for the message.
        axis: the rank axis of ``parameter`` (2-D).
        origins: (ranks after,) int64, where each rank was before, or −1 for a new one.

    Raises:
        OptimizerStateError: an entry has a shape for which no rule is known.
    """
    state = optimizer.state.get(parameter)
    if not state:
        return lambda: None
    updates = _plan(state, name, parameter, axis, origins)

    def apply() -> None:
        state.update({key: make() for key, make in updates.items()})

    return apply


def _plan(
    state: Mapping[str, Any], name: str, parameter: Tensor, axis: int, origins: Tensor
) -> dict[str, Callable[[], Any]]:
    """For each entry that changes, how to make its new value. Raises for shapes that fit no rule."""
    updates: dict[str, Callable[[], Any]] = {}
    for key, value in state.items():
        if not isinstance(value, Tensor) or key in _EIGHT_BIT_PARTS:
            continue
        if key in EIGHT_BIT and value.dtype == torch.uint8:
            _check_eight_bit(state, key, name, parameter)
            updates |= _eight_bit_updates(state, key, tuple(parameter.shape), axis, origins)
        elif key in FACTORED:
            averaged, stays = FACTORED[key]
            averaged %= parameter.dim()
            expected = list(parameter.shape)
            expected[averaged : averaged + 1] = [1] if stays else []
            if list(value.shape) != expected:
                raise _unknown(name, key, value, parameter)
            if averaged != axis:
                own_axis = axis if stays or axis < averaged else axis - 1
                updates[key] = _later(value, own_axis, origins)
        elif value.shape == parameter.shape:
            updates[key] = _later(value, axis, origins)
        elif value.dim() > 0 and value.numel() != 1:
            raise _unknown(name, key, value, parameter)
    return updates


def _later(value: Tensor, axis: int, origins: Tensor) -> Callable[[], Tensor]:
    return lambda: reindex_ranks(value, origins, axis)


def _unknown(name: str, key: str, value: Tensor, parameter: Tensor) -> OptimizerStateError:
    return OptimizerStateError(
        f"the optimiser's state {key!r} of {name} has shape {tuple(value.shape)}, which does not fit the parameter's "
        f"{tuple(parameter.shape)}. Load the optimiser after the ranks (and from the same checkpoint), or use AdamW, "
        "SGD, Adafactor or 8-bit AdamW"
    )


def _check_eight_bit(state: Mapping[str, Any], key: str, name: str, parameter: Tensor) -> None:
    absmax, code = (state.get(part) for part in EIGHT_BIT[key])
    blocks = -(-parameter.numel() // EIGHT_BIT_BLOCK)
    fits = (
        state[key].numel() == parameter.numel()
        and isinstance(absmax, Tensor)
        and isinstance(code, Tensor)
        and absmax.numel() == blocks
    )
    if not fits:
        raise _unknown(name, key, state[key], parameter)


def _eight_bit_updates(
    state: Mapping[str, Any], key: str, shape: tuple[int, ...], axis: int, origins: Tensor
) -> dict[str, Callable[[], Any]]:
    absmax_key, code_key = EIGHT_BIT[key]
    made: list[tuple[Tensor, Tensor]] = []

    def requantised() -> tuple[Tensor, Tensor]:
        if not made:
            from bitsandbytes import functional as bnb

            code = state[code_key]
            values = bnb.dequantize_blockwise(
                state[key].reshape(-1), absmax=state[absmax_key], code=code, blocksize=EIGHT_BIT_BLOCK
            ).reshape(shape)
            grown = reindex_ranks(values, origins, axis).contiguous()
            if not grown.numel():  # bitsandbytes refuses an empty tensor
                made.append((state[key].new_zeros(grown.shape), state[absmax_key].new_zeros(0)))
            else:
                quantised, quant_state = bnb.quantize_blockwise(grown, code=code, blocksize=EIGHT_BIT_BLOCK)
                made.append((quantised.reshape(grown.shape), quant_state.absmax))
        return made[0]

    return {key: lambda: requantised()[0], absmax_key: lambda: requantised()[1]}
