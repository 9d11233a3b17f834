"""Resizes an optimiser's state together with a parameter whose rank axis changes.

:func:`plan_state_update` computes the new state and raises if it cannot. The function that it returns only assigns it,
so an error leaves the optimiser as it was.

- A tensor of the parameter's own shape (Adam's and SGD's moments, amsgrad, Lion, …) is indexed on the rank axis. At new
  ranks it has the value of the optimiser's rule (:mod:`lorank.lora.optimizer_rules`).
- A scalar (Adam's step) is unchanged.
- A factored second moment of Adafactor (torch's or transformers' layout) is indexed on the rank axis, if it has one.
- Two moments in one tensor (AdEMAMix) are indexed together.
- With ``second_moments="mean"``, squares of gradients or steps begin at the mean over the kept ranks instead
  (:data:`SecondMoments`).
- If the layer is turned to another basis, entries with a rank axis first turn by their rule. Those that cannot turn,
  and those of an unknown optimiser, begin anew, which is logged once. A factored moment without a rank axis is a mean
  over ranks, and changes by as much as the mean of the other factor.
- bitsandbytes' 8-bit moments are dequantised, indexed and requantised block by block; so are torchao's 8-bit, 4-bit and
  fp8 moments. A moment that becomes too small for torchao's blocks becomes a plain tensor, as in a new optimiser.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from lorank.errors import OptimizerStateError
from lorank.lora.basis import Turn, turn_ranks
from lorank.lora.optimizer_rules import ADVICE, WEIGHT, ZERO, Entry, Rule, Turns, find_rule
from lorank.lora.rank_index import reindex_ranks

logger = logging.getLogger("lorank")
SecondMoments: TypeAlias = Literal["zero", "mean"]
"""Where the second moments of new ranks begin: as in a new optimiser, or at the mean over the parameter's kept ranks.

An optimiser has one count of steps per parameter. Late in a run, a second moment of zero says that a weight has never
had a gradient, so Adam's first update of a new rank is up to (1 − β₁)/√(1 − β₂) = 3.2 times the learning rate.
"""
_UNKNOWN = Entry(ZERO, Turns.BEGINS_ANEW)
"""An entry of an optimiser without a rule, which was tried with zeros (:mod:`lorank.lora.optimizer_trial`)."""

# Factored moments: name → (the axis that was averaged, whether this axis is kept with size 1).
FACTORED = {
    "row_var": (-1, True),  # torch.optim.Adafactor
    "col_var": (-2, True),
    "exp_avg_sq_row": (-1, False),  # transformers.Adafactor
    "exp_avg_sq_col": (-2, False),
}

STACKED = "state1"  # bitsandbytes' AdEMAMix: two moments in one tensor, (2, *the parameter's shape)

# bitsandbytes' blockwise 8-bit moments: values → (scales, code).
EIGHT_BIT = {"state1": ("absmax1", "qmap1"), "state2": ("absmax2", "qmap2")}
EIGHT_BIT_BLOCK = 256
_OTHER_BITSANDBYTES = {*(name for parts in EIGHT_BIT.values() for name in parts), "gnorm_vec"}  # no entry per rank

TORCHAO_SMALLEST = 4096  # torchao quantises moments of at least so many numbers


def unwrap_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """The torch optimiser inside accelerate's wrapper, or the optimiser itself.

    Raises:
        OptimizerStateError: there is no ``torch.optim.Optimizer``.
    """
    inner = optimizer
    while hasattr(inner, "optimizer") and not _has_own_state(inner):
        inner = inner.optimizer
    if not isinstance(inner, torch.optim.Optimizer):
        raise OptimizerStateError(
            f"expected a torch.optim.Optimizer (or accelerate's wrapper of one), got {type(optimizer).__name__}"
        )
    return inner


def _has_own_state(optimizer: Any) -> bool:
    if not isinstance(optimizer, torch.optim.Optimizer) or "state" not in vars(optimizer):
        return False
    # Lightning's wrapper copies the attributes of its optimiser, and calls the step of the optimiser.
    return getattr(getattr(optimizer, "optimizer", None), "state", None) is not optimizer.state


@dataclass(frozen=True)
class _Resize:
    """A change of a parameter's rank axis.

    Args:
        name: the parameter's name, for error messages.
        axis: the rank axis.
        origins: (ranks after,) int64, the old index of each rank, or −1 for a new rank.
        data: the parameter's values after the change.
        group: the parameter group.
        rule: the optimiser's rule; None: the optimiser is unknown, and was tried with zeros.
        kind: the name of the optimiser's class.
        state: the parameter's state before the change.
        turn: how the parameter turns to another basis before its ranks change; None: not at all.
        second_moments: where the second moments of new ranks begin.
    """

    name: str
    axis: int
    origins: Tensor
    data: Tensor
    group: Mapping[str, Any]
    rule: Rule | None
    kind: str
    state: Mapping[str, Any]
    turn: Turn | None = None
    second_moments: SecondMoments = "zero"

    def entry(self, key: str, values: Tensor) -> Tensor:
        """An entry of the parameter's shape, after the change."""
        resized = self.moved(key, values, self.axis)
        start = self._of(key).start
        new = (self.origins < 0).nonzero().squeeze(1).to(resized.device)
        if self.turn is not None and self._of(key).turns is Turns.BEGINS_ANEW:
            new = torch.arange(len(self.origins), device=resized.device)
        if self._begins_at_mean(key):
            return resized
        if start == WEIGHT:
            fresh = self.data.to(resized).index_select(self.axis, new)
            resized.index_copy_(self.axis, new, fresh)
        elif start != ZERO:
            resized.index_fill_(self.axis, new, float(self.group[start]))
        return resized

    def moved(self, key: str, values: Tensor, axis: int) -> Tensor:
        """An entry with a rank axis, turned and reindexed; at new ranks zero, or the mean over the kept ones."""
        if self.turn is not None:
            values = self._turned(key, values, axis)
        moved = reindex_ranks(values, self.origins, axis)
        return _with_means(moved, self.origins, axis) if self._begins_at_mean(key) else moved

    def _begins_at_mean(self, key: str) -> bool:
        """Whether new ranks begin at a mean: for squares, if a rank with a history is kept. Its mean is then known."""
        if self.second_moments == "mean" and self.rule is None and (self.kind, "second_moments") not in _logged:
            _logged.add((self.kind, "second_moments"))
            logger.warning(
                "%s: lorank does not know which entries of its state are second moments, so those of new ranks begin "
                "at zero and not at the mean. AdamW and Adafactor are known",
                self.kind,
            )
        return (
            self.second_moments == "mean"
            and self._of(key).turns in (Turns.AS_SQUARE, Turns.AS_MAXIMUM, Turns.AS_STEP_SQUARE)
            and bool((self.origins >= 0).any())
        )

    def _of(self, key: str) -> Entry:
        if self.rule is not None and key not in self.rule:
            raise KeyError(f"the entry {key!r} is not one of this optimiser's own")
        return _UNKNOWN if self.rule is None else self.rule[key]

    def _turned(self, key: str, values: Tensor, axis: int) -> Tensor:
        assert self.turn is not None
        turns, centre = self._of(key).turns, self._of(key).centre
        mean = None if centre is None else self.state.get(centre)
        if turns is Turns.AS_GRADIENT:
            return turn_ranks(values, self.turn.gradient, axis)
        if turns is Turns.AS_SQUARE and mean is not None:
            variance = (values.double() - mean.double().square()).clamp_min(0)
            turned_mean = turn_ranks(mean.double(), self.turn.gradient, axis)
            return (turn_ranks(variance, self.turn.square, axis) + turned_mean.square()).to(values.dtype)
        if turns is Turns.AS_SQUARE:
            return turn_ranks(values, self.turn.square, axis)
        if turns is Turns.AS_MAXIMUM:
            return turn_ranks(values.double().square(), self.turn.square, axis).sqrt().to(values.dtype)
        if turns is Turns.AS_WEIGHT:
            return turn_ranks(values, self.turn.weight, axis)
        if turns is Turns.AS_STEP_SQUARE:
            return turn_ranks(values, self.turn.step_square, axis)
        if (self.kind, key) not in _logged:
            _logged.add((self.kind, key))
            logger.warning(
                "%s: its state %r cannot be turned to another basis of the ranks, so it begins anew at every rotation. "
                "AdamW, SGD and Adafactor keep their moments",
                self.kind,
                key,
            )
        return torch.zeros_like(values)


def _with_means(values: Tensor, origins: Tensor, axis: int) -> Tensor:
    """``values`` with the mean over the kept ranks at the new ones."""
    origins = origins.to(values.device)
    kept, new = (origins >= 0).nonzero().squeeze(1), (origins < 0).nonzero().squeeze(1)
    mean = values.index_select(axis, kept).double().mean(axis, keepdim=True).to(values.dtype)
    return values.index_copy(axis, new, mean.expand_as(values.index_select(axis, new)))


_logged: set[tuple[str, str]] = set()
"""The optimisers' entries for which the log has a line already."""


def check_state(optimizer: torch.optim.Optimizer, name: str, parameter: Tensor) -> None:
    """Raises OptimizerStateError if the state of ``parameter`` does not fit the parameter's shape.

    A fused optimiser accepts such a state silently, or crashes the process.
    """
    _check_entries(optimizer.state.get(parameter, {}), name, parameter.shape)


def plan_state_update(
    optimizer: torch.optim.Optimizer,
    name: str,
    parameter: Tensor,
    axis: int,
    origins: Tensor,
    data: Tensor,
    turn: Turn | None = None,
    second_moments: SecondMoments = "zero",
) -> Callable[[], None]:
    """Computes the state of ``parameter`` after a resize, and returns a function that assigns it.

    Args:
        name: the parameter's name, for the error message.
        axis: the rank axis of ``parameter``.
        origins: (entries after,) int64, the old index of each entry of the rank axis, or −1 for a new one.
        data: the values of ``parameter`` after the resize.
        turn: how the parameter turns to another basis before its ranks change; None: not at all.
        second_moments: where the second moments of new ranks begin. Without a rule for the optimiser, which entries are
            squares is unknown, and they begin at zero.

    Raises:
        OptimizerStateError: there is no rule for an entry, or it cannot be resized. Nothing has changed.
    """
    state = optimizer.state.get(parameter)
    if not state:
        return lambda: None
    _check_entries(state, name, parameter.shape)
    group = next(group for group in optimizer.param_groups if any(p is parameter for p in group["params"]))
    rule, kind = find_rule(optimizer), type(optimizer).__name__
    resize = _Resize(name, axis, origins, data, group, rule, kind, state, turn, second_moments)
    try:
        updates = _resized_entries(state, resize, parameter.shape)
    except Exception as error:
        raise OptimizerStateError(
            f"the state of {name} in {type(optimizer).__name__} cannot be resized ({type(error).__name__}: {error}). "
            f"{ADVICE}"
        ) from error
    _check_entries({**state, **updates}, name, data.shape)
    return lambda: state.update(updates)


def reset_state(optimizer: torch.optim.Optimizer, parameter: Tensor) -> None:
    """Resets the state of ``parameter`` to that of a new optimiser. Call it when the parameter has its new shape."""
    old = optimizer.state.pop(parameter, None)
    if old and type(optimizer) is torch.optim.Adagrad:  # it makes its state when it is constructed, and only then
        group = next(group for group in optimizer.param_groups if any(p is parameter for p in group["params"]))
        total = torch.full_like(parameter, group["initial_accumulator_value"], requires_grad=False)
        optimizer.state[parameter] = {"step": torch.zeros_like(old["step"]), "sum": total}


def _check_entries(state: Mapping[str, Any], name: str, shape: torch.Size) -> None:
    """Raises for an entry whose shape has no rule."""
    for key, value in state.items():
        if not isinstance(value, Tensor) or key in _OTHER_BITSANDBYTES:
            continue
        if key in EIGHT_BIT and value.dtype == torch.uint8:
            _check_eight_bit(state, key, name, shape)
        elif key in FACTORED:
            axis, is_kept = FACTORED[key]
            axis %= len(shape)
            if list(value.shape) != [*shape[:axis], *([1] if is_kept else []), *shape[axis + 1 :]]:
                raise _shape_error(name, key, value, shape)
        elif value.shape != shape and value.dim() > 0 and value.numel() != 1 and not _is_stacked(key, value, shape):
            raise _shape_error(name, key, value, shape)


def _resized_entries(state: Mapping[str, Any], resize: _Resize, shape: torch.Size) -> dict[str, Tensor]:
    """The new values of the entries that change. The entries fit ``shape``, the parameter's old shape."""
    updates: dict[str, Tensor] = {}
    for key, value in state.items():
        if not isinstance(value, Tensor) or key in _OTHER_BITSANDBYTES:
            continue
        if key in EIGHT_BIT and value.dtype == torch.uint8:
            updates |= _resized_eight_bit(state, key, resize, shape)
        elif key in FACTORED:
            averaged_axis, is_kept = FACTORED[key]
            averaged_axis %= len(shape)
            if averaged_axis != resize.axis:
                rank_axis = resize.axis if is_kept or resize.axis < averaged_axis else resize.axis - 1
                updates[key] = resize.moved(key, value, rank_axis)
            elif resize.turn is not None:
                updates[key] = value * _change_of_mean(state, resize, averaged_axis, is_kept, len(shape)).to(value)
        elif _is_stacked(key, value, shape):
            updates[key] = resize.moved(key, value, resize.axis + 1)
        elif value.shape == shape:
            is_torchao = type(value).__module__.startswith("torchao.optim")
            updates[key] = _resized_torchao(key, value, resize) if is_torchao else resize.entry(key, value)
    return updates


def _change_of_mean(state: Mapping[str, Any], resize: _Resize, axis: int, is_kept: bool, dims: int) -> Tensor:
    """By what a turn multiplies a factored moment's mean over ranks: as the factor that has ranks says, a tensor ().

    Args:
        axis: the rank axis, over which the moment is a mean.
        is_kept: see FACTORED.
        dims: the number of axes of the parameter.
    """
    assert resize.turn is not None
    other, other_axis = next(
        (state[key], averaged % dims)
        for key, (averaged, kept) in FACTORED.items()
        if key in state and averaged % dims != axis and kept == is_kept
    )
    ranks = (other if is_kept else other.unsqueeze(other_axis)).double()  # (r, 1) or (1, r)
    before, after = ranks.mean(), turn_ranks(ranks, resize.turn.square, axis).mean()
    return torch.where(before > 0, after / before, torch.ones_like(before))


def _is_stacked(key: str, value: Tensor, shape: torch.Size) -> bool:
    return key == STACKED and value.shape == (2, *shape)


def _shape_error(name: str, key: str, value: Tensor, shape: torch.Size) -> OptimizerStateError:
    return OptimizerStateError(
        f"the optimiser's state {key!r} of {name} has shape {tuple(value.shape)}, which does not fit the parameter's "
        f"shape {tuple(shape)}. Load the optimiser after the ranks and from the same checkpoint. {ADVICE}"
    )


def _check_eight_bit(state: Mapping[str, Any], key: str, name: str, shape: torch.Size) -> None:
    absmax, code = (state.get(part) for part in EIGHT_BIT[key])
    value = state[key]
    moments = 2 if _is_stacked(key, value, shape) else 1
    blocks = -(-shape.numel() // EIGHT_BIT_BLOCK)
    fits = (
        value.numel() == moments * shape.numel()
        and isinstance(absmax, Tensor)
        and isinstance(code, Tensor)
        and absmax.numel() == moments * blocks
    )
    if not fits:
        raise _shape_error(name, key, value, shape)


def _resized_eight_bit(state: Mapping[str, Any], key: str, resize: _Resize, shape: torch.Size) -> dict[str, Tensor]:
    from bitsandbytes import functional as bnb

    absmax_key, code_key = EIGHT_BIT[key]
    codes, absmax, code = state[key], state[absmax_key], state[code_key]
    if not _is_stacked(key, codes, shape):
        codes, absmax = codes.unsqueeze(0), absmax.unsqueeze(0)
    quantised: list[tuple[Tensor, Tensor]] = []
    for own_codes, own_absmax in zip(codes, absmax, strict=True):
        if shape.numel():
            flat = own_codes.reshape(-1)
            values = bnb.dequantize_blockwise(flat, absmax=own_absmax, code=code, blocksize=EIGHT_BIT_BLOCK)
        else:
            values = own_codes.new_zeros(0, dtype=torch.float32)
        resized = resize.moved(key, values.reshape(shape), resize.axis).contiguous()
        if resized.numel():
            new_codes, quant_state = bnb.quantize_blockwise(resized, code=code, blocksize=EIGHT_BIT_BLOCK)
            quantised.append((new_codes.reshape(resized.shape), quant_state.absmax))
        else:  # bitsandbytes refuses an empty tensor
            quantised.append((own_codes.new_zeros(resized.shape), own_absmax.new_zeros(0)))
    if state[key].dim() == codes.dim():
        return {key: torch.stack([c for c, _ in quantised]), absmax_key: torch.stack([a for _, a in quantised])}
    return {key: quantised[0][0], absmax_key: quantised[0][1]}


def _resized_torchao(key: str, value: Any, resize: _Resize) -> Tensor:
    resized = resize.moved(key, value.dequantize(torch.float32), resize.axis)
    if resized.numel() < TORCHAO_SMALLEST or resized.numel() % value.block_size:
        return resized.to(value.dtype)
    sign = {"signed": value.signed} if hasattr(value, "signed") else {}
    quantised: Tensor = type(value).zeros(
        resized.shape, **sign, block_size=value.block_size, device=value.device, dtype=value.dtype
    )
    return quantised.copy_(resized)
