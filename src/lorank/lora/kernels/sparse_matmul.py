"""Sparse matrix products with the entries that dropout drops, at a fraction p of the arithmetic of a dense product.

DoRA also drops the input of the frozen base layer (linear map W), as PEFT does. So it needs W x̃ in addition to W x. The
dropped input x̃ is x minus the dropped entries, and so

    (1 − p) W x̃ = W x − W x_s        x_s: x at the dropped positions, zero elsewhere; a fraction p of it is non-zero

The gradient of x differs from the gradient without dropout only at the dropped positions. On a CPU, at p = 0.05, either
sparse product takes about a third of the time of the dense product that it replaces.
"""

from __future__ import annotations

import functools
import warnings

import torch
from torch import Tensor

MAX_SPARSE_P = 0.1
"""Above this p the dense product is faster."""
_BLOCK, _LARGE = 256, 1_000_000
"""Rows per block, and the number of elements above which a weight is multiplied in blocks of rows. PyTorch transposes
each block, and the result should fit into a cache."""


def is_sparse_faster(p: float, x: Tensor) -> bool:
    """Whether sparse products for dropout ``p`` of ``x`` are supported and faster than dense ones."""
    return (
        0 < p <= MAX_SPARSE_P
        and x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.float64)
        and _is_supported()
    )


def csr_indices(positions: Tensor, rows: int, width: int) -> tuple[Tensor, Tensor]:
    """Converts ascending flat positions (k,) in a matrix of shape (``rows``, ``width``) to the indices of a CSR matrix.

    Returns:
        int32: the start of each row, (rows + 1,), and the columns, (k,).
    """
    starts = torch.searchsorted(positions, torch.arange(0, (rows + 1) * width, width))
    return starts.to(torch.int32), positions.remainder(width).to(torch.int32)


def subtract_product_(out: Tensor, x: Tensor, W: Tensor, positions: Tensor, starts: Tensor, columns: Tensor) -> Tensor:
    """``out`` −= x_s Wᵀ, in place.

    Args:
        out: (n, d_out).
        x: (n, d_in), of which only the elements at ``positions`` are used.
        W: (d_out, d_in).
        starts, columns: :func:`csr_indices` of ``positions``.
    """
    dropped_entries = _matrix(starts, columns, x.reshape(-1).index_select(0, positions), x.shape[1])
    for rows in _blocks(W):
        out[:, rows].addmm_(dropped_entries, W[rows].T, alpha=-1)
    return out


def product_at_positions(dy: Tensor, W: Tensor, starts: Tensor, columns: Tensor) -> Tensor:
    """The elements of dy W at the positions of :func:`csr_indices`, (k,). dy: (n, d_out), W: (d_out, d_in)."""
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
def _is_supported() -> bool:
    """Whether this PyTorch computes these products correctly on the CPU. It needs MKL for them."""
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "in beta state", once per process
        x, W = torch.arange(6.0).view(2, 3), torch.arange(12.0).view(4, 3)
        positions = torch.tensor([1, 3, 5])
        dropped_entries = torch.zeros(6).index_copy(0, positions, x.flatten()[positions]).view(2, 3)
        dy = torch.arange(8.0).view(2, 4)
        try:
            starts, columns = csr_indices(positions, 2, 3)
            product = subtract_product_(torch.zeros(2, 4), x, W, positions, starts, columns)
            return torch.equal(product, -dropped_entries @ W.T) and torch.equal(
                product_at_positions(dy, W, starts, columns), (dy @ W).flatten()[positions]
            )
        except (RuntimeError, NotImplementedError):
            return False
