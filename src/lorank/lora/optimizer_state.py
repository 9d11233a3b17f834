"""Resizes an optimiser's state together with a parameter whose rank axis changes.

There are two phases, so that a state of unknown shape stops the resize before anything has changed.
:func:`plan_state_update` checks the state and raises. The function that it returns changes the state.

- A tensor of the parameter's own shape (Adam's and SGD's moments, amsgrad, Lion, …) is indexed on the rank axis.
- A scalar (Adam's step) is unchanged.
- A factored second moment of Adafactor (torch's or transformers' layout) is indexed on the rank axis, if it has one.
- bitsandbytes' 8-bit moments are dequantised, indexed and requantised block by block.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from lorank.errors import OptimizerStateError
from lorank.lora.rank_index import reindex_ranks

# Factored moments: name → (the axis that was averaged, whether this axis is kept with size 1).
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
        OptimizerStateError: there is no ``torch.optim.Optimizer``.
    """
    inner = optimizer
    while not _has_own_state(inner) and hasattr(inner, "optimizer"):
        inner = inner.optimizer
    if not isinstance(inner, torch.optim.Optimizer):
        raise OptimizerStateError(
            f"expected a torch.optim.Optimizer (or accelerate's wrapper of one), got {type(optimizer).__name__}"
        )
    return inner


def _has_own_state(optimizer: Any) -> bool:
    return isinstance(optimizer, torch.optim.Optimizer) and "state" in vars(optimizer)


def check_state(optimizer: torch.optim.Optimizer, name: str, parameter: Tensor) -> None:
    """Raises OptimizerStateError if the state of ``parameter`` does not fit the parameter's shape.

    A fused optimiser accepts such a state silently, or crashes the process. So this check runs after every resize.
    """
    _plan_updates(optimizer.state.get(parameter, {}), name, parameter, axis=0, origins=torch.arange(0))


def plan_state_update(
    optimizer: torch.optim.Optimizer, name: str, parameter: Tensor, axis: int, origins: Tensor
) -> Callable[[], None]:
    """Checks the state of ``parameter`` and returns a function that resizes it.

    Args:
        name: the parameter's name, for the error message.
        axis: the rank axis of ``parameter`` (2-D).
        origins: (ranks after,) int64, the old index of each rank, or −1 for a new rank.

    Raises:
        OptimizerStateError: an entry has a shape for which there is no rule.
    """
    state = optimizer.state.get(parameter)
    if not state:
        return lambda: None
    updates = _plan_updates(state, name, parameter, axis, origins)

    def apply() -> None:
        state.update({key: make() for key, make in updates.items()})

    return apply


def _plan_updates(
    state: Mapping[str, Any], name: str, parameter: Tensor, axis: int, origins: Tensor
) -> dict[str, Callable[[], Any]]:
    """For each entry that changes, a function that returns its new value. Raises for a shape without a rule."""
    updates: dict[str, Callable[[], Any]] = {}
    for key, value in state.items():
        if not isinstance(value, Tensor) or key in _EIGHT_BIT_PARTS:
            continue
        if key in EIGHT_BIT and value.dtype == torch.uint8:
            _check_eight_bit(state, key, name, parameter)
            updates |= _eight_bit_updates(state, key, tuple(parameter.shape), axis, origins)
        elif key in FACTORED:
            averaged_axis, is_kept = FACTORED[key]
            averaged_axis %= parameter.dim()
            expected = list(parameter.shape)
            expected[averaged_axis : averaged_axis + 1] = [1] if is_kept else []
            if list(value.shape) != expected:
                raise _shape_error(name, key, value, parameter)
            if averaged_axis != axis:
                rank_axis = axis if is_kept or axis < averaged_axis else axis - 1
                updates[key] = _reindex_later(value, rank_axis, origins)
        elif value.shape == parameter.shape:
            updates[key] = _reindex_later(value, axis, origins)
        elif value.dim() > 0 and value.numel() != 1:
            raise _shape_error(name, key, value, parameter)
    return updates


def _reindex_later(value: Tensor, axis: int, origins: Tensor) -> Callable[[], Tensor]:
    return lambda: reindex_ranks(value, origins, axis)


def _shape_error(name: str, key: str, value: Tensor, parameter: Tensor) -> OptimizerStateError:
    return OptimizerStateError(
        f"the optimiser's state {key!r} of {name} has shape {tuple(value.shape)}, which does not fit the parameter's "
        f"shape {tuple(parameter.shape)}. Load the optimiser after the ranks and from the same checkpoint, or use "
        "AdamW, SGD, Adafactor or 8-bit AdamW"
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
        raise _shape_error(name, key, state[key], parameter)


def _eight_bit_updates(
    state: Mapping[str, Any], key: str, shape: tuple[int, ...], axis: int, origins: Tensor
) -> dict[str, Callable[[], Any]]:
    absmax_key, code_key = EIGHT_BIT[key]
    results: list[tuple[Tensor, Tensor]] = []

    def requantise() -> tuple[Tensor, Tensor]:
        if not results:
            from bitsandbytes import functional as bnb

            code = state[code_key]
            values = bnb.dequantize_blockwise(
                state[key].reshape(-1), absmax=state[absmax_key], code=code, blocksize=EIGHT_BIT_BLOCK
            ).reshape(shape)
            grown = reindex_ranks(values, origins, axis).contiguous()
            if not grown.numel():  # bitsandbytes refuses an empty tensor
                results.append((state[key].new_zeros(grown.shape), state[absmax_key].new_zeros(0)))
            else:
                quantised, quant_state = bnb.quantize_blockwise(grown, code=code, blocksize=EIGHT_BIT_BLOCK)
                results.append((quantised.reshape(grown.shape), quant_state.absmax))
        return results[0]

    return {key: lambda: requantise()[0], absmax_key: lambda: requantise()[1]}
