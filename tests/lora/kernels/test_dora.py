"""The fused gated DoRA equals the plain formula: values and every gradient, whole tensors, float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lorank.lora.kernels import sparse_matmul
from lorank.lora.kernels.dora import fused_dora, row_norms
from lorank.lora.variants.dora import row_norms as formed_norms
from tests.lora.kernels.operands import CASES, D_IN, D_OUT, RANK, S, dropped_again, dropping, kept, operands, same


@pytest.mark.parametrize(("shape", "p", "gated"), CASES)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("sparse", [False, True])
def test_dora_equals_the_plain_formula(
    shape: Any, p: float, gated: bool, biased: bool, overwrite: bool, sparse: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sparse_matmul, "MAX_SPARSE_P", 0.5 if sparse else 0.0)
    o = operands(*shape)
    x, A, B, W, magnitude = o["x"], o["A"], o["B"], o["W"], o["magnitude"]
    gate = o["gate"] if gated else None
    bias = o["bias"] if biased else None
    ones = torch.ones(RANK, dtype=x.dtype)
    dropped = dropping(x, p)
    norm = formed_norms(W, A, B, S, ones if gate is None else gate)
    factor = magnitude / norm
    x_kept = kept(x, dropped)
    update = F.linear(x_kept, A) * (1 if gate is None else gate) @ B.T * S
    expected = F.linear(x, W, bias) + (factor - 1) * F.linear(x_kept, W) + factor * update
    found = row_norms(W, W.square().sum(1), A, B, S, gate)
    torch.testing.assert_close(found, norm, rtol=1e-12, atol=1e-12)
    result = F.linear(x, W, bias)
    actual = fused_dora(result, x, A, B, gate, S, magnitude, W, bias, found, dropped=dropped, overwrite=overwrite)
    same(actual, expected, [x, A, B, magnitude, *([o["gate"]] if gated else [])])


@pytest.mark.parametrize("p", [0.0, 0.4])
def test_gradcheck(p: float) -> None:
    o = operands(4)
    dropped = dropping(o["x"], p)
    norm = torch.rand(D_OUT, dtype=torch.float64) + 0.5

    def forward(x: Tensor, A: Tensor, B: Tensor, gate: Tensor, magnitude: Tensor) -> Tensor:
        now = None if dropped is None else dropped_again(x, dropped, p)
        result = F.linear(x, o["W"], o["bias"])
        return fused_dora(result, x, A, B, gate, S, magnitude, o["W"], o["bias"], norm, dropped=now)

    assert torch.autograd.gradcheck(forward, [o[name] for name in ("x", "A", "B", "gate", "magnitude")])


def test_an_input_in_any_layout() -> None:
    """A transposed input and output gradient, as attention makes them."""
    o = operands(2, 4)
    x = torch.randn(4, 2, D_IN, dtype=torch.float64).requires_grad_()
    turned = x.transpose(0, 1)
    A, B, gate, W, magnitude = (o[name] for name in ("A", "B", "gate", "W", "magnitude"))
    norm = row_norms(W, W.square().sum(1), A, B, S, gate)
    actual = fused_dora(F.linear(turned, W), turned, A, B, gate, S, magnitude, W, None, norm, overwrite=True)
    expected = (F.linear(turned, W) + F.linear(turned, A) * gate @ B.T * S) * (magnitude / norm)
    same(actual.transpose(0, 1), expected.transpose(0, 1), [x, A, B, gate])


def test_the_output_may_be_changed_in_place() -> None:
    """Falcon adds a residual in place to what a linear map returned."""
    o = operands(4)
    x, A, B, W, magnitude = (o[name] for name in ("x", "A", "B", "W", "magnitude"))
    norm = row_norms(W, W.square().sum(1), A, B, S, None)

    def forward() -> Tensor:
        return fused_dora(F.linear(x, W), x, A, B, None, S, magnitude, W, None, norm, overwrite=True)

    same(forward().add_(x[:, :D_OUT]), forward() + x[:, :D_OUT], [x, A, B])
