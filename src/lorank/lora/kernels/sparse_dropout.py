"""LoRA's dropout by the places where it strikes, not by a mask.

Dropout with p = 0.05 keeps 95 % of the numbers, so it is cheaper to draw where the next zero is (the gap is geometric)
than to draw every number's fate: 20 times fewer draws, and the same distribution, independent Bernoulli(p) for every
number. The places take 8 p bytes per number, where PEFT keeps 4 for the mask and 4 for the dropped input.

Scaling by 1 / (1 − p) is left to whoever multiplies by s, which is free.

Modules that see the same input (q, k and v; gate and up) may share one draw. In PEFT each draws for itself. Each
module's own dropout is the same; what differs is that a number dropped for one is dropped for the others. The draw is
shared only between modules that run directly after one another: same tensor object, unchanged, and nobody has drawn
from the random generator in between. So a forward that is computed again (gradient checkpointing) draws as before.
"""

from __future__ import annotations

import math
import weakref
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Dropped:
    """An input after dropout, before scaling.

    Attributes:
        x: (n, d_in), zero where it was dropped.
        places: int64, (k,), ascending: which of the n · d_in numbers are zero.
        keep: 1 − p.
    """

    x: Tensor
    places: Tensor
    keep: float


def draw_places(count: int, p: float, device: torch.device) -> Tensor:
    """Where Bernoulli(p) strikes in ``count`` trials: ascending, int64. Draws from the device's own generator.

    Args:
        p: in (0, 1).
    """
    expected = count * p
    enough = math.ceil(expected + 6 * math.sqrt(expected) + 6)
    last = -1
    parts = []
    while last < count:
        gaps = torch.empty(enough, dtype=torch.float32, device=device).geometric_(p)  # 1, 2, 3, …
        places = gaps.to(torch.int64).cumsum(0).add_(last)
        last = int(places[-1])
        parts.append(places)
    places = parts[0] if len(parts) == 1 else torch.cat(parts)
    return places[: int(torch.searchsorted(places, count))]


class Dropout:
    """Draws for the modules of one model, one after the other.

    Args:
        shared: whether modules with the same input share a draw.
    """

    def __init__(self, *, shared: bool = True) -> None:
        self.shared = shared
        self._last: tuple[weakref.ref[Tensor], int, float, Tensor, Dropped] | None = None

    def __call__(self, x: Tensor, p: float) -> Dropped:
        """x: (…, d_in), p in (0, 1)."""
        generator = _generator(x.device)
        last = self._last
        if last is not None and not x.is_inference():
            seen, version, last_p, state, dropped = last
            if seen() is x and version == x._version and last_p == p and torch.equal(state, generator.get_state()):
                return dropped
        flat = x.detach().reshape(-1, x.shape[-1])
        places = draw_places(flat.numel(), p, x.device)
        zeroed = flat.clone(memory_format=torch.contiguous_format)  # (n, d_in)
        zeroed.view(-1).scatter_(0, places, 0)
        dropped = Dropped(zeroed, places, 1 - p)
        if self.shared and not x.is_inference():  # an inference tensor does not tell whether it has changed
            self._last = (weakref.ref(x, self._forget), x._version, p, generator.get_state(), dropped)
        return dropped

    def _forget(self, seen: weakref.ref[Tensor]) -> None:
        if self._last is not None and self._last[0] is seen:
            self._last = None  # nobody can ask for it again: do not keep its memory

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
