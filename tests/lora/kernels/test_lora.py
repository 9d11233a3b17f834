"""The fused gated LoRA equals the plain formula: values and every gradient, whole tensors, float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lorank.lora.kernels.lora import fused_lora
from tests.lora.kernels.operands import CASES, D_IN, D_OUT, RANK, S, dropped_again, dropping, kept, operands, same


@pytest.mark.parametrize(("shape", "p", "gated"), CASES)
@pytest.mark.parametrize("fuse_base", [False, True])
@pytest.mark.parametrize("overwrite", [False, True])
def test_lora_equals_the_plain_formula(shape: Any, p: float, gated: bool, fuse_base: bool, overwrite: bool) -> None:
    o = operands(*shape)
    x, A, B, W = o["x"], o["A"], o["B"], o["W"]
    gate = o["gate"] if gated else None
    dropped = dropping(x, p)
    update = F.linear(kept(x, dropped), A) * (1 if gate is None else gate) @ B.T * S
    expected = F.linear(x, W, o["bias"]) + update
    result = F.linear(x, W, o["bias"])
    actual = fused_lora(result, x, A, B, gate, S, W=W if fuse_base else None, dropped=dropped, overwrite=overwrite)
    same(actual, expected, [x, A, B, *([o["gate"]] if gated else [])])


def test_only_what_is_asked_for_is_computed() -> None:
    """A frozen input (the first block's), frozen gates and frozen weights get no gradient."""
    o = operands(4)
    x, gate, B = o["x"].detach(), o["gate"].detach(), o["B"].detach()
    fused_lora(F.linear(x, o["W"]), x, o["A"], B, gate, S, W=o["W"]).sum().backward()
    assert o["A"].grad is not None
    assert x.grad is None
    assert gate.grad is None
    assert B.grad is None


def saved_numbers(output: Any, others: list[Tensor]) -> int:
    saved: dict[int, int] = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: saved.update({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()}) or t, lambda t: t
    ):
        kept_alive = output()
    del kept_alive
    for tensor in others:
        saved.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(saved.values()) // 8


@pytest.mark.parametrize("p", [0.0, 0.4])
def test_what_is_saved_is_x_and_z_alone(p: float) -> None:
    """Beside the parameters: n · (d_in + r) numbers, and where the zeros are."""
    o = operands(7)
    dropped = dropping(o["x"], p)
    positions = 0 if dropped is None else dropped.positions.untyped_storage().nbytes() // 8

    def output() -> Tensor:
        result = F.linear(o["x"], o["W"])
        return fused_lora(result, o["x"], o["A"], o["B"], o["gate"], S, W=o["W"], dropped=dropped)

    parameters = [o[name] for name in ("A", "B", "gate", "W")]
    assert saved_numbers(output, parameters) == 7 * (D_IN + RANK) + positions


@pytest.mark.parametrize("p", [0.0, 0.4])
def test_autocast_computes_in_the_lower_precision(p: float) -> None:
    o = operands(2, 4, dtype=torch.float32)
    x, A, B, gate = (o[name] for name in ("x", "A", "B", "gate"))
    dropped = dropping(x, p)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = fused_lora(F.linear(x, o["W"]), x, A, B, gate, S, W=o["W"], dropped=dropped, overwrite=True)
        expected = F.linear(x, o["W"]) + F.linear(F.linear(kept(x, dropped), A) * gate, B) * S
    assert actual.dtype == torch.bfloat16
    torch.testing.assert_close(actual.float(), expected.float(), rtol=0.05, atol=0.2)
    inputs = [x, A, B, gate]
    ours = torch.autograd.grad(actual.float().sum(), inputs)
    theirs = torch.autograd.grad(expected.float().sum(), inputs)
    for our, their in zip(ours, theirs, strict=True):
        assert our.dtype == torch.float32
        torch.testing.assert_close(our, their, rtol=0.05, atol=0.3)


def test_writing_over_a_value_that_is_still_needed_is_noticed() -> None:
    """tanh keeps its output for its backward pass: autograd must refuse, not compute something else."""
    o = operands(4)
    base = torch.tanh(F.linear(o["x"], o["W"]))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        fused_lora(base, o["x"], o["A"], o["B"], o["gate"], S, overwrite=True).sum().backward()


@pytest.mark.parametrize("p", [0.0, 0.4])
def test_gradcheck(p: float) -> None:
    o = operands(4)
    dropped = dropping(o["x"], p)

    def forward(x: Tensor, A: Tensor, B: Tensor, gate: Tensor) -> Tensor:
        now = None if dropped is None else dropped_again(x, dropped, p)
        return fused_lora(F.linear(x, o["W"], o["bias"]), x, A, B, gate, S, W=o["W"], dropped=now)

    assert torch.autograd.gradcheck(forward, [o[name] for name in ("x", "A", "B", "gate")])


def test_an_input_in_any_layout() -> None:
    """A transposed input and output gradient, as attention makes them."""
    o = operands(2, 4)
    x = torch.randn(4, 2, D_IN, dtype=torch.float64).requires_grad_()
    turned = x.transpose(0, 1)
    A, B, gate, W = (o[name] for name in ("A", "B", "gate", "W"))
    actual = fused_lora(F.linear(turned, W), turned, A, B, gate, S, W=W, overwrite=True)
    expected = F.linear(turned, W) + F.linear(turned, A) * gate @ B.T * S
    same(actual.transpose(0, 1), expected.transpose(0, 1), [x, A, B, gate])


def test_the_output_may_be_changed_in_place() -> None:
    """Falcon adds a residual in place to what a linear map returned."""
    o = operands(4)
    x, A, B, W = (o[name] for name in ("x", "A", "B", "W"))

    def forward() -> Tensor:
        return fused_lora(F.linear(x, W), x, A, B, None, S, W=W, overwrite=True)

    same(forward().add_(x[:, :D_OUT]), forward() + x[:, :D_OUT], [x, A, B])
