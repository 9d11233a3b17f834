"""Products with what dropout strikes out equal the whole products of which they are a part, float64."""

from __future__ import annotations

import pytest
import torch

from lorank.lora.kernels import sparse_matmul
from lorank.lora.kernels.sparse_dropout import draw_dropped_positions

pytestmark = pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")


@pytest.mark.parametrize("large", [10**6, 0])
def test_both_products(large: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows without a place, places in a row's first and last column, weights in one block and in several."""
    monkeypatch.setattr(sparse_matmul, "_LARGE", large)
    monkeypatch.setattr(sparse_matmul, "_BLOCK", 3)
    torch.manual_seed(0)
    n, d_in, d_out = 5, 7, 11
    x, W, dy = (torch.randn(shape, dtype=torch.float64) for shape in ((n, d_in), (d_out, d_in), (n, d_out)))
    positions = torch.tensor([0, 3, 6, 14, 33, 34])  # none in the second and fourth row
    only = torch.zeros(n * d_in, dtype=torch.float64)
    only[positions] = x.flatten()[positions]
    starts, columns = sparse_matmul.csr_indices(positions, n, d_in)
    out = torch.randn(n, d_out, dtype=torch.float64)
    expected = out - only.view(n, d_in) @ W.T
    assert sparse_matmul.subtract_product_(out, x, W, positions, starts, columns) is out
    torch.testing.assert_close(out, expected, rtol=1e-13, atol=1e-13)
    found = sparse_matmul.product_at_positions(dy, W, starts, columns)
    torch.testing.assert_close(found, (dy @ W).flatten()[positions], rtol=1e-13, atol=1e-13)


def test_no_dropped_positions() -> None:
    positions = torch.tensor([], dtype=torch.int64)
    starts, columns = sparse_matmul.csr_indices(positions, 2, 3)
    x, W = torch.ones(2, 3), torch.ones(4, 3)
    assert torch.equal(
        sparse_matmul.subtract_product_(torch.ones(2, 4), x, W, positions, starts, columns), torch.ones(2, 4)
    )
    assert sparse_matmul.product_at_positions(torch.ones(2, 4), W, starts, columns).shape == (0,)


@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="PyTorch's sparse products on a CPU need MKL")
def test_sparse_is_faster_for_small_p_in_supported_dtypes() -> None:
    x = torch.randn(2, 3)
    assert sparse_matmul.is_sparse_faster(0.05, x)
    assert sparse_matmul.is_sparse_faster(0.05, x.double())
    assert not sparse_matmul.is_sparse_faster(0.05, x.bfloat16())
    assert not sparse_matmul.is_sparse_faster(0.5, x)
    assert not sparse_matmul.is_sparse_faster(0.0, x)


def test_csr_indices_give_the_drawn_positions() -> None:
    torch.manual_seed(0)
    positions = draw_dropped_positions(1200, 0.05, torch.device("cpu"))
    starts, columns = sparse_matmul.csr_indices(positions, 30, 40)
    rows = torch.repeat_interleave(torch.arange(30), starts.diff().long())
    assert torch.equal(rows * 40 + columns, positions)
