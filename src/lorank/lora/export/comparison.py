"""How far the updates of written files are from the original ones, in float64."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lorank.errors import AdapterError

Factors = tuple[Tensor, Tensor]
"""s · B and A of one module, (d_out, r) and (r, d_in), float64."""


def largest_difference(before: Mapping[str, Factors], after: Mapping[str, Factors]) -> float:
    """The largest ‖ΔW − ΔW'‖ / ‖ΔW‖ of any module. A module that only one side has counts as ΔW = 0 on the other.

    ΔW itself, (d_out, d_in), is never formed.
    """
    largest = 0.0
    for name in before.keys() | after.keys():
        old, new = before.get(name), after.get(name)
        size = _norm(*old) if old is not None else 0.0
        if old is None or new is None:
            difference = size if new is None else _norm(*new)
        else:
            if len(old[0]) != len(new[0]) or old[1].shape[1] != new[1].shape[1]:
                raise AdapterError(f"{name} was written with other shapes than it has")
            difference = _norm(torch.cat([old[0], -new[0]], 1), torch.cat([old[1], new[1]], 0))
        if difference:
            largest = max(largest, difference / size if size else float("inf"))
    return largest


def _norm(left: Tensor, right: Tensor) -> float:
    """‖left · right‖, by triangular factors, which lose no digits to cancellation."""
    upper = torch.linalg.qr(left).R @ torch.linalg.qr(right.T).R.T
    return float(torch.linalg.matrix_norm(upper))
