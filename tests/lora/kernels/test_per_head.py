"""The fast per-head LoRA equals one plain LoRA with block-structured matrices: values and every gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lorank.lora.kernels.per_head import HeadGroups, compact_A, compact_B, dense_A, dense_B, per_head, per_head_dense
from lorank.lora.kernels.sparse_dropout import Dropout

OTHER = 5  # the side of the projection that has no heads


def operands(groups: HeadGroups, ranks: list[int], *, dtype: torch.dtype = torch.float64, seed: int = 0) -> Any:
    """result (2, 3, d_out), x (2, 3, d_in), A, B, gate, all of which require a gradient."""
    generator = torch.Generator().manual_seed(seed)
    R, width = sum(ranks), groups.count * groups.size
    rows = groups.kind == "rows"
    shapes = [
        (2, 3, width if rows else OTHER),
        (2, 3, OTHER if rows else width),
        (R, OTHER if rows else groups.size),
        (groups.size if rows else OTHER, R),
        (R,),
    ]
    return [torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes]


heads = st.builds(
    lambda kind, size, ranks: (HeadGroups(kind, len(ranks), size), ranks),
    st.sampled_from(["rows", "columns"]),
    st.integers(1, 3),
    st.lists(st.integers(0, 3), min_size=1, max_size=4),
)


@settings(max_examples=60, deadline=None)
@given(heads=heads, gated=st.booleans(), overwrite=st.booleans(), seed=st.integers(0, 99))
def test_equals_the_dense_twin(heads: tuple[HeadGroups, list[int]], gated: bool, overwrite: bool, seed: int) -> None:
    groups, ranks = heads
    *tensors, gate = operands(groups, ranks, seed=seed)
    gate = gate if gated else torch.ones_like(gate).requires_grad_()
    expected = per_head_dense(*tensors, gate, 1.7, groups, ranks)
    base, *others = tensors
    # ``overwrite`` writes over the frozen map's output, which is never a leaf.
    actual = per_head(base * 1.0, *others, gate if gated else None, 1.7, groups, ranks, overwrite=overwrite)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    weights = torch.randn_like(expected)
    inputs = [*tensors, *([gate] if gated else [])]
    ours = torch.autograd.grad((actual * weights).sum(), inputs)
    theirs = torch.autograd.grad((expected * weights).sum(), inputs, materialize_grads=True)
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our, their, rtol=1e-12, atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(
    heads=heads, p=st.sampled_from([0.0, 0.4]), fuse_base=st.booleans(), gated=st.booleans(), seed=st.integers(0, 99)
)
def test_with_dropout_and_the_base_layers_gradient(
    heads: tuple[HeadGroups, list[int]], p: float, fuse_base: bool, gated: bool, seed: int
) -> None:
    """What is dropped is dropped for the heads alone; x's gradient through W is there, whoever computes it."""
    groups, ranks = heads
    _, x, A, B, gate = operands(groups, ranks, seed=seed)
    torch.manual_seed(seed)
    d_out = groups.count * groups.size if groups.kind == "rows" else OTHER
    W = torch.randn(d_out, x.shape[-1], dtype=x.dtype)
    dropped = Dropout()(x, p) if p else None
    mask = torch.ones(x.numel(), dtype=x.dtype)
    if dropped is not None:
        mask[dropped.positions] = 0
    kept = x * mask.view(x.shape) / (1 - p)
    used = gate if gated else None
    expected = per_head_dense(F.linear(x, W), kept, A, B, used, 1.7, groups, ranks)
    actual = per_head(
        F.linear(x, W), x, A, B, used, 1.7, groups, ranks, W=W if fuse_base else None, dropped=dropped, overwrite=True
    )
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    weights = torch.randn_like(expected)
    inputs = [x, A, B, *([gate] if gated else [])]
    ours = torch.autograd.grad((actual * weights).sum(), inputs)
    theirs = torch.autograd.grad((expected * weights).sum(), inputs, materialize_grads=True)
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our, their, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["rows", "columns"])
def test_the_dense_matrices_are_the_blocks_and_zeros(kind: Any) -> None:
    """The twin itself, against a loop over the heads."""
    groups, ranks = HeadGroups(kind, 3, 2), [2, 0, 1]
    _, _, A, B, _ = operands(groups, ranks)
    compact, dense = (B.T, dense_B(B, groups, ranks).T) if kind == "rows" else (A, dense_A(A, groups, ranks))
    expected = torch.zeros(3, 6, dtype=torch.float64)
    for rank, head in enumerate([0, 0, 2]):
        expected[rank, 2 * head : 2 * head + 2] = compact[rank].detach()
    assert torch.equal(dense, expected)
    assert dense_A(A, groups, ranks) is A if kind == "rows" else dense_B(B, groups, ranks) is B


@pytest.mark.parametrize("kind", ["rows", "columns"])
def test_gradcheck(kind: Any) -> None:
    groups, ranks = HeadGroups(kind, 3, 2), [2, 0, 1]
    assert torch.autograd.gradcheck(lambda *tensors: per_head(*tensors, 0.5, groups, ranks), operands(groups, ranks))


@given(heads=heads, seed=st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_compact_and_dense_are_inverse(heads: tuple[HeadGroups, list[int]], seed: int) -> None:
    groups, ranks = heads
    _, _, A, B, _ = operands(groups, ranks, seed=seed)
    assert torch.equal(compact_A(dense_A(A, groups, ranks), groups, ranks), A)
    assert torch.equal(compact_B(dense_B(B, groups, ranks), groups, ranks), B)
    compact, dense = (B, dense_B(B, groups, ranks)) if groups.kind == "rows" else (A, dense_A(A, groups, ranks))
    assert (dense != 0).sum() == compact.numel()  # every number has its place, and there is nothing else


def test_only_what_is_asked_for_is_computed() -> None:
    """A frozen input (the first block's), and frozen weights, get no gradient."""
    groups, ranks = HeadGroups("rows", 2, 2), [1, 2]
    result, x, A, B, gate = operands(groups, ranks)
    per_head(result.detach(), x.detach(), A, B.detach(), gate, 1.0, groups, ranks).sum().backward()
    assert A.grad is not None
    assert gate.grad is not None
    assert x.grad is None
    assert B.grad is None


def test_what_is_saved_is_x_and_z_alone() -> None:
    """Beside the parameters: n · (d_in + R) numbers, as a plain LoRA of rank R."""
    groups, ranks = HeadGroups("rows", 4, 2), [3, 1, 0, 2]
    result, x, A, B, gate = operands(groups, ranks)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        per_head(result, x, A, B, gate, 1.0, groups, ranks)
    parameters = {A.data_ptr(), B.data_ptr(), gate.data_ptr()}
    numbers = sum(t.numel() for t in saved if t.data_ptr() not in parameters)
    assert numbers == 6 * (OTHER + 6)


@pytest.mark.parametrize("kind", ["rows", "columns"])
def test_autocast_computes_in_the_lower_precision(kind: Any) -> None:
    groups, ranks = HeadGroups(kind, 2, 3), [2, 1]
    tensors = operands(groups, ranks, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = per_head(*tensors, 1.0, groups, ranks)
        expected = per_head_dense(*tensors, 1.0, groups, ranks)
    assert actual.dtype == torch.bfloat16
    torch.testing.assert_close(actual.float(), expected.float(), rtol=0.05, atol=0.1)
    actual.float().sum().backward()
    for tensor in tensors:
        assert tensor.grad.dtype == torch.float32


def test_writing_over_a_value_that_is_still_needed_is_noticed() -> None:
    """tanh keeps its output for its backward pass: autograd must refuse, not compute something else."""
    groups, ranks = HeadGroups("rows", 2, 2), [1, 1]
    result, x, A, B, gate = operands(groups, ranks)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        per_head(torch.tanh(result), x, A, B, gate, 1.0, groups, ranks, overwrite=True).sum().backward()


def test_a_second_derivative_is_refused() -> None:
    groups, ranks = HeadGroups("rows", 2, 2), [1, 1]
    tensors = operands(groups, ranks)
    out = per_head(*tensors, 1.0, groups, ranks)
    (first,) = torch.autograd.grad((out**2).sum(), tensors[1], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()
