"""Screened scores: the ranks that go are those of exact scores, and no rank is evaluated once that is settled."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from lorank.allocators import Budget
from lorank.allocators.reallocation import lowest_ranks
from lorank.lora import find_layers
from lorank.scoring import ablation_scores, first_order_scores, screened_scores
from lorank.scoring.ablation_variants import (
    TERMS,
    IncompatibleError,
    VariantLosses,
    VariantSelection,
    flatten_variants,
    unknown_losses,
)
from lorank.scoring.prefix_cache.engine import ExactEngine
from lorank.scoring.successive_screening import _lower_bounds, _screen
from tests.models import adapted, class_batch, tiny_bert, tiny_llama, token_batch
from tests.scoring.test_preserve_state import state
from tests.scoring.test_work_sharding import ThreadShare, together

RANKS = {"r": 3, "rank_pattern": {"q_proj|query": 1, "down_proj|dense": 4}}


def flat(scores: Mapping[str, Tensor]) -> Tensor:
    return torch.cat(list(scores.values()))


def lowest(count: int):
    return lambda scores: lowest_ranks(scores, count, {})


def llama(scale: float = 1.0):
    """With adapters of a given size: small ones are nearly linear, large ones are not."""
    model = adapted(tiny_llama(), **RANKS)
    layers = find_layers(model)
    with torch.no_grad():
        for layer in layers.values():
            layer.B.mul_(scale)
    return model, layers, token_batch(padded=True)


@pytest.mark.parametrize("engine", ["exact", "reference"])
@pytest.mark.parametrize("terms", ["both", "without", "alone"])
@pytest.mark.parametrize("scale", [0.2, 5.0], ids=["straight", "curved"])
def test_the_same_ranks_go_as_by_exact_scores(scale, terms, engine) -> None:
    model, layers, batch = llama(scale)
    exact = ablation_scores(model, layers, batch, terms=terms, engine=engine)
    estimates = flat(first_order_scores(model, layers, batch, terms=terms).scores)
    for count in (5, 20) if engine == "exact" else (5,):
        choose = lowest(count)
        result = screened_scores(model, layers, batch, choose, terms=terms, engine=engine)
        assert choose(result.scores) == choose(exact.scores)
        assert (result.engine, result.baseline) == (engine, pytest.approx(exact.baseline, rel=1e-6))
        # exact where evaluated, estimates elsewhere
        evaluated = (flat(result.scores) - flat(exact.scores)).abs() < 1e-5
        assert bool((evaluated | ((flat(result.scores) - estimates).abs() < 1e-5)).all())
        assert result.evaluations >= len(TERMS[terms]) * count + 1


def test_what_is_settled_is_not_evaluated() -> None:
    model, layers, batch = llama(0.05)
    exact = ablation_scores(model, layers, batch)
    result = screened_scores(model, layers, batch, lowest(5))
    ranks = layers.total_rank
    assert exact.evaluations == 2 * ranks + 1
    assert result.evaluations == 2 * round(ranks / 4) + 1, "estimates of a nearly linear model settle it at once"
    assert result.backward_passes == 2


def test_a_budget_chooses_the_same_ranks() -> None:
    model, layers, batch = llama()
    limits = Budget(parameters=layers.parameters // 2).resolve(layers)

    def gone(scores: Mapping[str, Tensor]) -> list[tuple[str, int]]:
        kept = limits.keep_best(scores)
        return [(name, k) for name, values in scores.items() for k in range(len(values)) if k not in kept[name]]

    exact = ablation_scores(model, layers, batch).scores
    assert gone(screened_scores(model, layers, batch, gone).scores) == gone(exact)


def test_a_classifier() -> None:
    model = adapted(tiny_bert(), **RANKS, task_type="SEQ_CLS")
    layers, batch = find_layers(model), class_batch(padded=True)
    exact = ablation_scores(model, layers, batch).scores
    choose = lowest(7)
    assert choose(screened_scores(model, layers, batch, choose).scores) == choose(exact)


def test_with_a_loss_of_the_users_own() -> None:
    """The reference engine is asked again and again, and must find the model's own gates each time."""
    model, layers, batch = llama()
    for layer in layers.values():
        layer.gate = torch.linspace(0.5, 1.5, layer.rank)
    choose = lowest(9)
    plain = screened_scores(model, layers, batch, choose, terms="alone")
    own = screened_scores(model, layers, batch, choose, terms="alone", loss_fn=lambda m, b: m(**b).loss)
    assert own.engine == "reference"
    assert own.evaluations > 2 * len(choose(own.scores)), "one call was enough: this test would pass without a second"
    torch.testing.assert_close(flat(own.scores), flat(plain.scores), rtol=0, atol=1e-5)


def test_an_engine_that_gives_up_in_the_middle_leaves_its_gates_to_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    model, layers, batch = llama()
    expected = ablation_scores(model, layers, batch, engine="reference")
    calls = []

    def losses(self: ExactEngine, *_: Any) -> VariantLosses:
        calls.append(self)
        for name in self.layers:
            self.layers[name].gate = self.gates.variants(name, "alone")[0]
        raise IncompatibleError("it changed its mind")

    monkeypatch.setattr(ExactEngine, "losses", losses)
    result = ablation_scores(model, layers, batch)
    assert (result.engine, len(calls)) == ("reference", 1)
    assert torch.equal(flat(result.scores), flat(expected.scores))


def test_everything_is_restored() -> None:
    model, layers, batch = llama()
    before = state(model, layers)
    screened_scores(model, layers, batch, lowest(5))
    assert state(model, layers) == before


def test_processes_share_the_evaluations() -> None:
    models = [llama()[0] for _ in range(3)]
    batch = token_batch(padded=True)

    def work(share: ThreadShare | None):
        model = models[share.index if share else 0]
        return screened_scores(model, find_layers(model), batch, lowest(5), share=share)

    whole, shared = work(None), together(work)
    for result in shared:
        assert torch.equal(flat(result.scores), flat(shared[0].scores)), "the processes have different scores"
        torch.testing.assert_close(flat(result.scores), flat(whole.scores), rtol=0, atol=1e-5)


@pytest.mark.parametrize("option", [{"terms": "some"}, {"max_rows": 0}])
def test_options_out_of_range(option) -> None:
    model, layers, batch = llama()
    with pytest.raises(ValueError, match=next(iter(option))):
        screened_scores(model, layers, batch, lowest(1), **option)


# The decision by itself, on scores out of thin air


class Evaluate:
    """Gives exact scores of the term "without", L(M) being 0."""

    def __init__(self, layers: Mapping[str, Any], exact: Mapping[str, Tensor]) -> None:
        self.layers, self.exact, self.asked = layers, exact, 0

    def __call__(self, wanted: VariantSelection, backgrounds: Collection[str]) -> VariantLosses:
        losses = unknown_losses(self.layers, wanted)  # type: ignore[arg-type]
        for term, name, k in flatten_variants(wanted):
            losses[term][name][k] = self.exact[name][k]
            self.asked += 1
        return VariantLosses(0.0 if backgrounds else None, None, losses, 0)


def decide(estimates: dict[str, Tensor], exact: dict[str, Tensor], choose) -> tuple[dict[str, Tensor], int]:
    layers = {name: SimpleNamespace(rank=len(values)) for name, values in exact.items()}
    evaluate = Evaluate(layers, exact)
    scores, baseline = _screen(layers, estimates, choose, evaluate, "without")  # type: ignore[arg-type]
    assert baseline == 0
    return scores, evaluate.asked


@given(
    ranks=st.lists(st.integers(0, 9), min_size=1, max_size=6).filter(lambda ranks: sum(ranks) > 4),
    spread=st.floats(0.01, 3),
    fraction=st.floats(0.01, 0.9),
    least=st.integers(0, 1),
    seed=st.integers(0, 10_000),
)
def test_where_no_estimate_is_wrong_by_more_than_assumed_the_decision_is_the_exact_one(
    ranks, spread, fraction, least, seed
) -> None:
    generator = torch.Generator().manual_seed(seed)
    exact = {f"m{i}": torch.randn(rank, generator=generator, dtype=torch.float64) for i, rank in enumerate(ranks)}
    estimates = {
        name: values + spread * (2 * torch.rand(len(values), generator=generator, dtype=torch.float64) - 1)
        for name, values in exact.items()
    }
    errors = (flat(estimates) - flat(exact)).abs()
    first = max(1, round(len(errors) / 4))
    seen = errors[torch.sort(flat(estimates), stable=True).indices[:first]].max()
    assume(float(errors.max()) <= 2 * float(seen))
    minima = {name: min(least, len(values)) for name, values in exact.items()}
    count = max(1, int(fraction * (sum(ranks) - sum(minima.values()))))

    def choose(scores: Mapping[str, Tensor]) -> list[tuple[str, int]]:
        return lowest_ranks(scores, count, minima)

    scores, _ = decide(estimates, exact, choose)
    assert set(choose(scores)) == set(choose(exact))


def test_a_rank_whose_estimate_is_no_number_is_evaluated() -> None:
    exact = {"m": torch.arange(16.0, dtype=torch.float64)}
    estimates = {"m": exact["m"].clone()}
    estimates["m"][9] = torch.nan
    scores, asked = decide(estimates, exact, lowest(2))
    assert torch.equal(scores["m"], exact["m"])
    assert asked == 4


def test_without_any_error_to_judge_by_everything_is_open() -> None:
    nothing = {"m": torch.full((3,), torch.nan, dtype=torch.float64)}
    assert bool((_lower_bounds({"m": torch.zeros(3, dtype=torch.float64)}, nothing)["m"] == -torch.inf).all())
