"""Products with the few numbers that dropout strikes out: a sparse matrix, and p of the arithmetic of a whole one.

DoRA drops the input of the frozen map too (as PEFT does), so beside W x it needs W x̃. But x̃ is x less what was struck
out, and so is its product:

    (1 − p) W x̃ = W x − W x_s        x_s: x where it was struck out, zero elsewhere; p of its numbers are there

and the gradient of x differs from what it would be without dropout only at the places that were struck. On a CPU, at
p = 0.05, either costs about a third of the whole product that it replaces.
"""

from __future__ import annotations

import functools
import warnings

import torch
from torch import Tensor

DENSEST = 0.1
"""Above this p a whole product is the faster one."""
_BLOCK, _LARGE = 256, 1_000_000
"""A weight with more numbers than this goes through in blocks of rows: PyTorch transposes it, which should stay in a
cache."""


def pays(p: float, x: Tensor) -> bool:
    """Whether sparse products are the faster way for dropout ``p`` of ``x``, and there."""
    return 0 < p <= DENSEST and x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64) and _works()


def pattern(places: Tensor, rows: int, width: int) -> tuple[Tensor, Tensor]:
    """Places (k,), ascending, of the ``rows`` · ``width`` numbers of a matrix, as the indices of a CSR matrix.

    Returns:
        int32: where each row begins, (rows + 1,), and the columns, (k,).
    """
    starts = torch.searchsorted(places, torch.arange(0, (rows + 1) * width, width))
    return starts.to(torch.int32), places.remainder(width).to(torch.int32)


def subtract_product_(out: Tensor, x: Tensor, W: Tensor, places: Tensor, starts: Tensor, columns: Tensor) -> Tensor:
    """``out`` −= x_s Wᵀ, in place.

    Args:
        out: (n, d_out).
        x: (n, d_in), of which only what stands at ``places`` counts.
        W: (d_out, d_in).
        starts, columns: :func:`pattern` of ``places``.
    """
    struck = _matrix(starts, columns, x.reshape(-1).index_select(0, places), x.shape[1])
    for rows in _blocks(W):
        out[:, rows].addmm_(struck, W[rows].T, alpha=-1)
    return out


def product_at(dy: Tensor, W: Tensor, starts: Tensor, columns: Tensor) -> Tensor:
    """(dy W) at the places of a pattern alone, (k,). dy: (n, d_out), W: (d_out, d_in)."""
    total = _matrix(starts, columns, dy.new_zeros(len(columns)), W.shape[1])
    for rows in _blocks(W):
        total = torch.sparse.sampled_addmm(total, dy[:, rows], W[rows])
    return total.values()


def _blocks(W: Tensor) -> list[slice]:
    step = _BLOCK if W.numel() > _LARGE else len(W)
    return [slice(start, start + step) for start in range(0, len(W), step)]


def _matrix(starts: Tensor, columns: Tensor, values: Tensor, width: int) -> Tensor:
    return torch.sparse_csr_tensor(starts, columns, values, (len(starts) - 1, width), check_invariants=False)


@functools.cache
def _works() -> bool:
    """Whether this PyTorch has these products on the CPU (it needs MKL for them)."""
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "in beta state", once per process
        x, W = torch.arange(6.0).view(2, 3), torch.arange(12.0).view(4, 3)
        places = torch.tensor([1, 3, 5])
        struck = torch.zeros(6).index_copy(0, places, x.flatten()[places]).view(2, 3)
        dy = torch.arange(8.0).view(2, 4)
        try:
            starts, columns = pattern(places, 2, 3)
            product = subtract_product_(torch.zeros(2, 4), x, W, places, starts, columns)
            return torch.equal(product, -struck @ W.T) and torch.equal(
                product_at(dy, W, starts, columns), (dy @ W).flatten()[places]
            )
        except (RuntimeError, NotImplementedError):
            return False
