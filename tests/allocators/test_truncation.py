"""Balanced truncation in stages: what is kept is what a naive twin keeps, and budgets hold in every unit."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lorank.allocators import Budget, ResolvedBudget, truncate_
from lorank.allocators.resolved_budget import Constraint
from lorank.allocators.truncation import stage_budget
from lorank.errors import BudgetError, PlanError
from lorank.lora import find_layers
from lorank.scoring import balanced_scores, measure_gramians
from lorank.scoring.balanced_scores import PATH
from tests.models import adapted, tiny_bert, tiny_gpt2, tiny_llama, token_batch

BATCHES = [token_batch(rows=3, seed=seed) for seed in (1, 2)]


def updates(layers: Any) -> dict[str, torch.Tensor]:
    return {name: layer.scaling * (layer.B @ layer.A).detach() for name, layer in layers.items()}


def test_one_stage_keeps_what_a_naive_twin_keeps() -> None:
    """The twin diagonalises Z D itself, and projects the updates."""
    model = adapted(tiny_llama(), target_modules=["q_proj", "v_proj", "down_proj"]).double().eval()
    layers = find_layers(model)
    pairs = measure_gramians(model, layers, BATCHES)
    before = {name: (layer.A.detach().clone(), layer.B.detach().clone()) for name, layer in layers.items()}
    modes = []  # (worth per number, worth, module, left and right eigenvector of Z D)
    for name, layer in layers.items():
        values, right = torch.linalg.eig(pairs[name].Z @ pairs[name].D)
        left = torch.linalg.inv(right)
        cost = layer.d_in + layer.d_out
        modes += [(float(v.real) / cost, float(v.real), name, right[:, i].real, left[i].real)
                  for i, v in enumerate(values)]  # fmt: skip
    modes.sort(key=lambda mode: mode[0], reverse=True)
    limit = layers.parameters // 2
    expected = {name: torch.zeros_like(B @ A) for name, (A, B) in before.items()}
    used, lost = 0, 0.0
    for _, worth, name, right_vector, left_vector in modes:
        A, B = before[name]
        cost = A.shape[1] + B.shape[0]
        if used + cost <= limit:
            used += cost
            expected[name] += layers[name].scaling * (B @ torch.outer(right_vector, left_vector) @ A)
        else:
            lost += worth / 2
    budget = Budget.parse("50% of adapter").resolve(layers)
    (stage,) = truncate_(model, layers, BATCHES, budget, stages=1, path=(1.0,))
    assert layers.parameters == used
    assert stage.ranks == layers.ranks
    assert len(set(layers.ranks.values())) > 1, "all alike: the choice between modules would not be tested"
    assert stage.predicted == pytest.approx(lost, rel=1e-9)
    for name, update in updates(layers).items():
        torch.testing.assert_close(update, expected[name], rtol=1e-8, atol=1e-10)


def test_ranks_that_another_basis_hides_cost_nothing() -> None:
    """The update has rank 2 per module, spread over 4 ranks of similar size. Half of the parameters hold all of it."""
    model = adapted(tiny_llama(), target_modules=["q_proj", "v_proj"]).double().eval()
    layers = find_layers(model)
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for layer in layers.values():
            mix = torch.randn(2, 4, generator=draw, dtype=torch.float64)
            layer.B.copy_(layer.B[:, :2] @ mix)
        whole = model(**BATCHES[0]).logits
    truncate_(model, layers, BATCHES, Budget.parse("50% of adapter").resolve(layers))
    assert set(layers.ranks.values()) == {2}
    with torch.no_grad():
        torch.testing.assert_close(model(**BATCHES[0]).logits, whole, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("make", "settings"),
    [
        (tiny_llama, {"use_dora": True}),
        (tiny_llama, {"use_rslora": True}),
        (tiny_llama, {"target_modules": ["embed_tokens", "o_proj"]}),
        (tiny_gpt2, {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}),
    ],
    ids=["dora", "rslora", "embedding", "conv1d"],
)
@pytest.mark.parametrize("budget", ["30% of adapter", "7 ranks", {"parameters": 400, "max_lora_rank": 2}])
def test_every_kind_of_layer_and_unit(make: Any, settings: dict, budget: Any) -> None:
    model = adapted(make(), **{"target_modules": ["q_proj", "down_proj"], **settings}).eval()
    layers = find_layers(model)
    scalings = {name: layer.scaling for name, layer in layers.items()}
    resolved = Budget.parse(budget).resolve(layers)
    done = truncate_(model, layers, BATCHES, resolved, stages=3)
    assert resolved.fits(layers.ranks)
    assert all(rank >= resolved.minima[name] for name, rank in layers.ranks.items())
    assert all(stage.predicted >= 0 for stage in done)
    assert {name: layer.scaling for name, layer in layers.items() if layer.rank} == {
        name: scalings[name] for name, rank in layers.ranks.items() if rank
    }
    model(**BATCHES[0]).loss.backward()


def test_stages_shrink_by_equal_ratios_and_measure_anew() -> None:
    model = adapted(tiny_llama(), r=16).eval()
    layers = find_layers(model)
    start = layers.parameters
    calls: list[tuple[int, int]] = []
    first = balanced_scores(model, layers, BATCHES)
    done = truncate_(
        model, layers, BATCHES, Budget.parse("12.5% of adapter").resolve(layers), stages=3, first=first,
        progress=lambda part, total: calls.append((part, total)),
    )  # fmt: skip
    costs = {name: layer.d_in + layer.d_out for name, layer in layers.items()}
    sizes = [sum(rank * costs[name] for name, rank in stage.ranks.items()) for stage in done]
    assert sizes == pytest.approx([start / 2, start / 4, start / 8], rel=0.05)
    passes = 2 * len(BATCHES) * len(PATH)  # the first of three stages was measured before
    assert calls == [(done, passes) for done in range(1, passes + 1)]
    assert done[0].predicted > 0


def test_more_stages_than_ranks() -> None:
    model = adapted(tiny_llama(), r=2, target_modules=["q_proj"]).eval()
    layers = find_layers(model)
    done = truncate_(model, layers, BATCHES, Budget(ranks=3).resolve(layers), stages=50)
    assert layers.total_rank == 3
    assert len(done) == 1
    assert truncate_(model, layers, BATCHES, Budget(ranks=3).resolve(layers)) == []


def test_a_classifier() -> None:
    model = adapted(tiny_bert(), target_modules=["query", "value"], modules_to_save=["classifier"]).eval()
    layers = find_layers(model)
    batch = {**token_batch(), "labels": torch.arange(4) % 3}
    truncate_(model, layers, [batch], Budget(ranks=5).resolve(layers), stages=2)
    assert layers.total_rank == 5


def test_refusals_change_nothing() -> None:
    model = adapted(tiny_llama()).eval()
    layers = find_layers(model)
    budget = Budget(ranks=3).resolve(layers)
    before = layers.ranks
    with pytest.raises(BudgetError, match="stages=0: expected at least 1"):
        truncate_(model, layers, BATCHES, budget, stages=0)
    layers.learn_gates()
    with pytest.raises(PlanError, match="with gates"):
        truncate_(model, layers, BATCHES, budget)
    assert layers.ranks == before


@given(
    limit=st.integers(1, 500), start=st.integers(1, 60), cost=st.integers(1, 20), positions=st.lists(st.floats(0, 1))
)
def test_the_way_to_a_budget(limit: int, start: int, cost: int, positions: list[float]) -> None:
    budget = ResolvedBudget((Constraint("parameters", {"m": cost}, limit),), {"m": 64}, {"m": 0})
    ranks = {"m": start}
    assert stage_budget(budget, ranks, 0.0).fits(ranks)
    assert stage_budget(budget, ranks, 1.0) == budget
    limits = [stage_budget(budget, ranks, p).constraints[0].limit for p in sorted(positions)]
    assert limits == sorted(limits, reverse=True)
    assert all(limit <= found <= max(limit, start * cost) for found in limits)
    if start * cost > limit:
        middle = stage_budget(budget, ranks, 0.5).constraints[0].limit
        assert middle == pytest.approx(math.sqrt(start * cost * limit), abs=1)
