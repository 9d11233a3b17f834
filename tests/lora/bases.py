"""Bases of ranks for tests, and the parts of a layer that turn."""

from __future__ import annotations

import torch
from torch import Tensor

from lorank.lora.basis import Basis


def basis_of(matrix: Tensor) -> Basis:
    matrix = matrix.double()
    return Basis(matrix, torch.linalg.inv(matrix))


def random_basis(rank: int, seed: int = 0, *, largest: float = 10.0) -> Basis:
    """Random, with singular values between 1 and ``largest``."""
    generator = torch.Generator().manual_seed(seed)
    left, right = (
        torch.linalg.qr(torch.randn(rank, rank, generator=generator, dtype=torch.float64)).Q for _ in range(2)
    )
    return basis_of(left * torch.logspace(0, torch.tensor(largest).log10(), rank, dtype=torch.float64) @ right)


def signed_permutation(order: tuple[int, ...], signs: tuple[int, ...]) -> Basis:
    """Rank i becomes ± rank ``order[i]``."""
    matrix = torch.zeros(len(order), len(order), dtype=torch.float64)
    for i, (old, sign) in enumerate(zip(order, signs, strict=True)):
        matrix[i, old] = sign
    return basis_of(matrix)
