"""Masks, their closed-form gradients and the rounding, against autograd and against the definition."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorank.allocators.ard.masks import (
    effective_of_stored,
    layout,
    masks,
    penalty_gradient,
    rounded_ranks,
    stored_ranks,
    task_gradient,
    temperature,
)


def test_temperature_falls_geometrically() -> None:
    taus = [temperature(step, 100, 0.8, 0.05) for step in range(101)]
    assert taus[0] == 0.8
    assert taus[50] == pytest.approx(0.2)
    assert taus[100] == pytest.approx(0.05)
    assert temperature(150, 100, 0.8, 0.05) == pytest.approx(0.05)


def test_layout_leaves_out_empty_groups() -> None:
    member, position = layout(torch.tensor([2, 0, 3, 1]))
    assert member.tolist() == [0, 0, 2, 2, 2, 3]
    assert position.tolist() == [0, 1, 0, 1, 2, 0]


@settings(max_examples=40, deadline=None)
@given(counts=st.lists(st.integers(0, 4), min_size=1, max_size=5), tau=st.floats(0.05, 2.0), seed=st.integers(0, 99))
def test_the_gradient_is_autograds(counts: list[int], tau: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    alpha = torch.rand(len(counts), dtype=torch.float64, generator=generator).requires_grad_()
    r0 = torch.randint(1, 9, (len(counts),), generator=generator).double()
    member, position = layout(torch.tensor(counts))
    values = masks(r0 * alpha, member, position, tau)
    outer = torch.randn(len(member), dtype=torch.float64, generator=generator)
    expected = torch.autograd.grad((values * outer).sum(), alpha)[0] if len(member) else torch.zeros_like(alpha)
    actual = task_gradient(outer, values.detach(), r0, member, position, tau)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("l1_term", [True, False])
def test_the_penaltys_gradient_is_autograds(l1_term: bool) -> None:
    alpha = torch.tensor([0.5, 1.5, 0.0], dtype=torch.float64, requires_grad=True)
    before = torch.tensor([0.4, 1.7, 0.0], dtype=torch.float64)
    penalty = 0.3 * (float(l1_term) * alpha.abs().sum() + 0.7 * ((alpha - before) ** 2).sum())
    (expected,) = torch.autograd.grad(penalty, alpha)
    torch.testing.assert_close(penalty_gradient(alpha.detach(), before, 0.3, 0.7, l1_term), expected)


@settings(max_examples=60, deadline=None)
@given(
    effective=st.lists(st.floats(0, 12), min_size=1, max_size=6),
    tau=st.floats(0.05, 2.0),
    epsilon=st.floats(0.01, 0.4),
    min_rank=st.integers(0, 2),
)
def test_stored_are_the_ranks_whose_mask_exceeds_epsilon_and_at_least_r(
    effective: list[float], tau: float, epsilon: float, min_rank: int
) -> None:
    e, caps = torch.tensor(effective, dtype=torch.float64), torch.full((len(effective),), 10)
    rounded, stored = rounded_ranks(e, min_rank, caps), stored_ranks(e, tau, epsilon, min_rank, caps)
    for value, r, count in zip(effective, rounded.tolist(), stored.tolist(), strict=True):
        assert r == min(10, max(min_rank, math.floor(value + 0.5)))
        mask = torch.sigmoid((value - torch.arange(60, dtype=torch.float64) - 0.5) / tau)
        exceeding = int((mask > epsilon).sum())
        assert abs(count - min(10, max(r, exceeding))) <= (1 if abs(_edge(value, tau, epsilon)) < 1e-9 else 0)
        assert count >= r


def _edge(value: float, tau: float, epsilon: float) -> float:
    """How far the last mask is from ε, in ranks: where it is ε itself, rounding decides."""
    reach = value - 0.5 + tau * math.log((1 - epsilon) / epsilon)
    return reach - round(reach)


def test_the_effective_rank_of_stored_ranks_stores_as_many() -> None:
    """Also the largest one that does: a little more stores another rank."""
    counts, caps = torch.arange(2, 9), torch.full((7,), 99)
    for tau, epsilon in ((0.5, 0.05), (0.1, 0.01)):
        effective = effective_of_stored(counts, tau, epsilon)
        assert torch.equal(stored_ranks(effective - 1e-9, tau, epsilon, 0, caps), counts)
        assert torch.equal(stored_ranks(effective + 1e-6, tau, epsilon, 0, caps), counts + 1)
