"""The fused gated LoRA and DoRA equal the plain formula: values and every gradient, whole tensors, float64."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lorank.lora.kernels import sparse_matmul
from lorank.lora.kernels.dora import fused_dora, row_norms
from lorank.lora.kernels.lora import fused_lora
from lorank.lora.kernels.sparse_dropout import Dropout, DroppedInput
from lorank.lora.variants.dora import row_norms as formed_norms

D_IN, D_OUT, RANK, S = 6, 5, 3, 1.7


def operands(*shape: int, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """x (*shape, d_in) and all parameters; W and b are frozen, everything else requires a gradient."""
    generator = torch.Generator().manual_seed(0)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=dtype)

    trained = {
        "x": draw(*shape, D_IN),
        "A": draw(RANK, D_IN),
        "B": draw(D_OUT, RANK),
        "gate": draw(RANK),
        "magnitude": draw(D_OUT),
    }
    return {name: tensor.requires_grad_() for name, tensor in trained.items()} | {
        "W": draw(D_OUT, D_IN),
        "bias": draw(D_OUT),
    }


def dropping(x: Tensor, p: float) -> DroppedInput | None:
    torch.manual_seed(3)
    return Dropout()(x, p) if p else None


def kept(x: Tensor, dropped: DroppedInput | None) -> Tensor:
    """x after dropout, in plain autograd."""
    if dropped is None:
        return x
    mask = torch.ones(x.numel(), dtype=x.dtype)
    mask[dropped.positions] = 0
    return x * mask.view(x.shape) / dropped.keep


def same(actual: Tensor, expected: Tensor, inputs: list[Tensor]) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    weights = torch.randn_like(expected)
    ours = torch.autograd.grad((actual * weights).sum(), inputs)
    theirs = torch.autograd.grad((expected * weights).sum(), inputs)
    for our, their in zip(ours, theirs, strict=True):
        assert our.shape == their.shape
        torch.testing.assert_close(our, their, rtol=1e-12, atol=1e-12)


SHAPES = [(7,), (2, 4), (2, 3, 2)]
CASES = list(itertools.product(SHAPES, [0.0, 0.4], [False, True]))


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
@pytest.mark.parametrize("dora", [False, True])
def test_gradcheck(p: float, dora: bool) -> None:
    o = operands(4)
    dropped = dropping(o["x"], p)
    norm = torch.rand(D_OUT, dtype=torch.float64) + 0.5

    def forward(x: Tensor, A: Tensor, B: Tensor, gate: Tensor, magnitude: Tensor) -> Tensor:
        # What was dropped is drawn once; its values follow x.
        now = (
            None
            if dropped is None
            else DroppedInput((kept(x, dropped) * dropped.keep).detach(), dropped.positions, 1 - p)
        )
        result = F.linear(x, o["W"], o["bias"])
        if dora:
            return fused_dora(result, x, A, B, gate, S, magnitude, o["W"], o["bias"], norm, dropped=now)
        return fused_lora(result, x, A, B, gate, S, W=o["W"], dropped=now) * magnitude

    assert torch.autograd.gradcheck(forward, [o[name] for name in ("x", "A", "B", "gate", "magnitude")])


@pytest.mark.parametrize("dora", [False, True])
def test_an_input_in_any_layout(dora: bool) -> None:
    """A transposed input and output gradient, as attention makes them."""
    o = operands(2, 4)
    x = torch.randn(4, 2, D_IN, dtype=torch.float64).requires_grad_()
    turned = x.transpose(0, 1)
    A, B, gate, W, magnitude = (o[name] for name in ("A", "B", "gate", "W", "magnitude"))
    norm = row_norms(W, W.square().sum(1), A, B, S, gate)
    result = F.linear(turned, W)
    if dora:
        actual = fused_dora(result, turned, A, B, gate, S, magnitude, W, None, norm, overwrite=True)
    else:
        actual = fused_lora(result, turned, A, B, gate, S, W=W, overwrite=True)
    expected = F.linear(turned, W) + F.linear(turned, A) * gate @ B.T * S
    expected = expected * (magnitude / norm) if dora else expected
    same(actual.transpose(0, 1), expected.transpose(0, 1), [x, A, B, gate])


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


@pytest.mark.parametrize("dora", [False, True])
def test_the_output_may_be_changed_in_place(dora: bool) -> None:
    """Falcon adds a residual in place to what a linear map returned."""
    o = operands(4)
    x, A, B, W, magnitude = (o[name] for name in ("x", "A", "B", "W", "magnitude"))
    norm = row_norms(W, W.square().sum(1), A, B, S, None)

    def forward() -> Tensor:
        if dora:
            return fused_dora(F.linear(x, W), x, A, B, None, S, magnitude, W, None, norm, overwrite=True)
        return fused_lora(F.linear(x, W), x, A, B, None, S, W=W, overwrite=True)

    same(forward().add_(x[:, :D_OUT]), forward() + x[:, :D_OUT], [x, A, B])
