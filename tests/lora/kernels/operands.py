"""Operands of one layer, dropout in plain autograd, and the comparison of a kernel with the plain formula."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from lorank.lora.kernels.sparse_dropout import Dropout, DroppedInput

D_IN, D_OUT, RANK, S = 6, 5, 3, 1.7
SHAPES = [(7,), (2, 4), (2, 3, 2)]
CASES = list(itertools.product(SHAPES, [0.0, 0.4], [False, True]))


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


def dropped_again(x: Tensor, dropped: DroppedInput, p: float) -> DroppedInput:
    """The same positions of another x. For finite differences: positions are drawn once, values follow x."""
    return DroppedInput((kept(x, dropped) * dropped.keep).detach(), dropped.positions, 1 - p)
