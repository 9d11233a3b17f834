"""LoRA's dropout as a list of the dropped positions, in place of a dropout mask.

Dropout with p = 0.05 keeps 95 % of the elements. The gap to the next dropped element has a geometric distribution, so
drawing these gaps takes 20 times fewer draws than a mask with one draw per element. The distribution is the same:
independent Bernoulli(p) for every element. The positions take 8 p bytes per element; PEFT keeps 4 bytes for the mask
and 4 bytes for the dropped input.

The factor 1 / (1 − p) is not applied here. The caller multiplies it into s, at no cost.

Modules with the same input (q, k and v; gate and up) may share one draw. In PEFT each module makes its own draw. The
dropout of each single module has the same distribution; the difference is that an element dropped for one module is
dropped for the others too. A draw is shared only between modules that run directly after one another: they must get the
same, unchanged tensor object, and no other code may use the random generator in between. So a recomputed forward pass
(gradient checkpointing) makes the same draws as the first one.
"""

from __future__ import annotations

import math
import weakref
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class DroppedInput:
    """An input after dropout, before scaling.

    Attributes:
        x: (n, d_in), zero at the dropped positions.
        positions: int64, (k,), ascending: the flat indices of the dropped elements, from 0 to n · d_in − 1.
        keep: 1 − p.
    """

    x: Tensor
    positions: Tensor
    keep: float


def draw_dropped_positions(count: int, p: float, device: torch.device) -> Tensor:
    """Draws the positions of the successes in ``count`` Bernoulli(p) trials, with the device's own generator.

    Args:
        count: the number of trials. ≥ 0.
        p: in (0, 1).

    Returns:
        int64, (k,), ascending.
    """
    expected = count * p
    enough = math.ceil(expected + 6 * math.sqrt(expected) + 6)
    last = -1
    parts = []
    while last < count:
        gaps = torch.empty(enough, dtype=torch.float32, device=device).geometric_(p)  # 1, 2, 3, …
        positions = gaps.to(torch.int64).cumsum(0).add_(last)
        last = int(positions[-1])
        parts.append(positions)
    positions = parts[0] if len(parts) == 1 else torch.cat(parts)
    return positions[: int(torch.searchsorted(positions, count))]


class Dropout:
    """The dropout of all modules of one model.

    Args:
        shared: whether modules with the same input share a draw.
    """

    def __init__(self, *, shared: bool = True) -> None:
        self.shared = shared
        self._last: tuple[weakref.ref[Tensor], int, float, Tensor, DroppedInput] | None = None

    def __call__(self, x: Tensor, p: float) -> DroppedInput:
        """Drops elements of x. x: (…, d_in), p in (0, 1)."""
        generator = _generator(x.device)
        last = self._last
        if last is not None and not x.is_inference():
            seen, version, last_p, state, dropped = last
            if seen() is x and version == x._version and last_p == p and torch.equal(state, generator.get_state()):
                return dropped
        flat = x.detach().reshape(-1, x.shape[-1])
        positions = draw_dropped_positions(flat.numel(), p, x.device)
        zeroed = flat.clone(memory_format=torch.contiguous_format)  # (n, d_in)
        zeroed.view(-1).scatter_(0, positions, 0)
        dropped = DroppedInput(zeroed, positions, 1 - p)
        if self.shared and not x.is_inference():  # an inference tensor has no version counter that shows changes
            self._last = (weakref.ref(x, self._forget), x._version, p, generator.get_state(), dropped)
        return dropped

    def _forget(self, seen: weakref.ref[Tensor]) -> None:
        if self._last is not None and self._last[0] is seen:
            self._last = None  # the input no longer exists, so the draw cannot be used again: free its memory

    def __deepcopy__(self, memo: object) -> Dropout:
        return Dropout(shared=self.shared)

    def __reduce__(self) -> tuple[object, ...]:
        return (_dropout, (self.shared,))


def _dropout(shared: bool) -> Dropout:
    return Dropout(shared=shared)


def _generator(device: torch.device) -> torch.Generator:
    if device.type == "cpu":
        return torch.default_generator
    module = torch.get_device_module(device)
    index = device.index if device.index is not None else module.current_device()
    generator: torch.Generator = module.default_generators[index]
    return generator
