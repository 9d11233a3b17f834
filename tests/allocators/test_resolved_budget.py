"""What a budget's limits promise, for any modules, costs and scores."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lorank.allocators.resolved_budget import Constraint, ResolvedBudget
from lorank.errors import BudgetError


@st.composite
def some_budgets(draw: st.DrawFn, *, equal_costs: bool = False, minima: bool = True) -> ResolvedBudget:
    names = [f"m{i}" for i in range(draw(st.integers(1, 6)))]
    caps = {name: draw(st.integers(1, 9)) for name in names}
    least = {name: draw(st.integers(0, 1)) if minima else 0 for name in names}
    constraints = []
    for index in range(draw(st.integers(1, 2))):
        costs = {name: 1 if equal_costs else draw(st.integers(1, 50)) for name in names}
        needed = sum(costs[name] * least[name] for name in names)
        constraints.append(Constraint(f"unit{index}", costs, needed + draw(st.integers(0, 300))))
    return ResolvedBudget(tuple(constraints), caps, least)


def some_scores(data: st.DataObject, budget: ResolvedBudget) -> dict[str, torch.Tensor]:
    few = st.sampled_from([-1.0, 0.0, 0.5, 1.0, 2.0])  # ties are common
    return {
        name: torch.tensor(data.draw(st.lists(few, min_size=budget.minima[name], max_size=8))) for name in budget.caps
    }


@given(some_budgets())
def test_uniform_fits_is_even_and_leaves_no_level_unused(budget: ResolvedBudget) -> None:
    ranks = budget.uniform()
    assert budget.fits(ranks)
    assert all(ranks[name] >= budget.minima[name] for name in ranks)
    below_cap = [rank for name, rank in ranks.items() if rank < budget.caps[name]]
    lowest = min(below_cap, default=0)
    for name, rank in ranks.items():
        if below_cap:
            assert rank <= max(lowest + 1, budget.minima[name])
    one_more = {name: min(budget.caps[name], rank + 1) for name, rank in ranks.items()}
    assert one_more == ranks or not budget.fits(one_more)


@given(some_budgets(equal_costs=True, minima=False))
def test_uniform_spends_a_budget_of_ranks_to_the_last_one(budget: ResolvedBudget) -> None:
    limit = min(constraint.limit for constraint in budget.constraints)
    assert sum(budget.uniform().values()) == min(limit, sum(budget.caps.values()))
    assert budget.is_used_up_by(budget.uniform())


def test_the_remainder_is_dealt_in_module_order() -> None:
    budget = ResolvedBudget(
        (Constraint("ranks", {"a": 1, "b": 1, "c": 1}, 8),), {"a": 9, "b": 9, "c": 9}, dict.fromkeys("abc", 0)
    )
    assert budget.uniform() == {"a": 3, "b": 3, "c": 2}


@given(st.data(), some_budgets())
def test_keep_best_fits_keeps_what_is_needed_and_leaves_out_nothing_that_would_fit(
    data: st.DataObject, budget: ResolvedBudget
) -> None:
    scores = some_scores(data, budget)
    kept = budget.keep_best(scores)
    ranks = {name: len(some) for name, some in kept.items()}
    assert budget.fits(ranks)
    for name, some in kept.items():
        assert list(some) == sorted(set(some))
        assert len(some) >= budget.minima[name]
        stays = [float(scores[name][rank]) for rank in some]
        goes = [float(scores[name][rank]) for rank in range(len(scores[name])) if rank not in some]
        assert not stays or not goes or min(stays) >= max(goes)
        assert not goes or not budget.room(ranks, name)


@given(st.data(), some_budgets(equal_costs=True, minima=False))
def test_keep_best_is_the_top_k_when_all_ranks_cost_the_same(data: st.DataObject, budget: ResolvedBudget) -> None:
    budget = ResolvedBudget(budget.constraints, dict.fromkeys(budget.caps, 8), budget.minima)
    scores = some_scores(data, budget)
    k = min(constraint.limit for constraint in budget.constraints)
    everything = [
        (-float(value), position, rank, name)
        for position, (name, values) in enumerate(scores.items())
        for rank, value in enumerate(values)
    ]
    best = {(name, rank) for _, _, rank, name in sorted(everything)[:k]}
    assert {(name, rank) for name, some in budget.keep_best(scores).items() for rank in some} == best


def test_a_rank_that_does_not_fit_makes_way_for_a_cheaper_one() -> None:
    budget = ResolvedBudget(
        (Constraint("parameters", {"wide": 10, "slim": 3}, 16),), {"wide": 8, "slim": 8}, {"wide": 0, "slim": 0}
    )
    scores = {"wide": torch.tensor([5.0, 9.0]), "slim": torch.tensor([1.0, 2.0, 0.5])}
    assert budget.keep_best(scores) == {"wide": (1,), "slim": (0, 1)}


def test_a_score_that_is_not_a_number_is_refused() -> None:
    budget = ResolvedBudget((Constraint("ranks", {"a": 1, "b": 1}, 2),), {"a": 4, "b": 4}, {"a": 0, "b": 0})
    with pytest.raises(BudgetError, match="score of rank 1 of b is NaN"):
        budget.keep_best({"a": torch.ones(2), "b": torch.tensor([1.0, torch.nan])})


@given(st.data(), some_budgets())
def test_room_is_exactly_what_still_fits(data: st.DataObject, budget: ResolvedBudget) -> None:
    ranks = budget.uniform()
    for name in ranks:
        ranks[name] = data.draw(st.integers(0, ranks[name]))
    for name in ranks:
        room = budget.room(ranks, name)
        assert budget.fits({**ranks, name: ranks[name] + room})
        assert not budget.fits({**ranks, name: ranks[name] + room + 1})


@given(st.data(), some_budgets(), st.lists(st.floats(0, 1), min_size=2, max_size=2))
def test_relaxed_limits_only_tighten_and_begin_with_room_for_the_start(
    data: st.DataObject, budget: ResolvedBudget, fractions: list[float]
) -> None:
    start = {name: data.draw(st.integers(0, 20)) for name in budget.caps}
    late, early = (budget.relaxed(start, fraction) for fraction in sorted(fractions))
    for wide, tight in zip(early.constraints, late.constraints, strict=True):
        assert wide.limit >= tight.limit
    assert all(early.caps[name] >= late.caps[name] for name in start)
    assert budget.relaxed(start, 1.0).fits(start)
    assert budget.relaxed(start, 0.0) == budget


@given(st.integers(1, 50), st.integers(0, 200), st.floats(0, 1))
def test_relaxed_ranks_are_adaloras_schedule(final: int, more: int, fraction: float) -> None:
    """b(t) = ⌊(b0 − b_T) · f + b_T⌋, in the same floating-point order as AdaLoRA's own code."""
    b0 = final + more
    budget = ResolvedBudget((Constraint("ranks", {"m": 1}, final),), {"m": 500}, {"m": 0})
    assert budget.relaxed({"m": b0}, fraction).constraints[0].limit == int((b0 - final) * fraction + final)


def test_a_fraction_out_of_range() -> None:
    budget = ResolvedBudget((Constraint("ranks", {"m": 1}, 3),), {"m": 5}, {"m": 0})
    with pytest.raises(BudgetError, match=r"fraction=1\.5"):
        budget.relaxed({"m": 4}, 1.5)


def test_used_speaks_in_the_users_units() -> None:
    budget = ResolvedBudget(
        (Constraint("ranks_per_module", {"a": 1, "b": 1}, 16, 2),), {"a": 20, "b": 20}, {"a": 0, "b": 0}
    )
    assert budget.used({"a": 3, "b": 10}) == {"ranks_per_module": {"used": 6.5, "limit": 8.0}}
