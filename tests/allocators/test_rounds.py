"""Rounds with a scorer that somebody else has written: what it is asked, when, and what becomes of its scores."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import lorank
from lorank.allocators import Context, State, TrainingInfo
from lorank.allocators.reallocation import prune_and_reallocate
from lorank.allocators.rounds import RoundAllocator
from lorank.allocators.settings import settings
from lorank.errors import ScheduleError, ValidationBatchError
from lorank.lora import AdapterLayers, Basis, LayerPlan, find_layers
from lorank.scoring import Choose, Scorer, Scores
from tests.allocators.runs import adamw, run_loop, same_run
from tests.models import adapted, tiny_llama

CALLS: list[tuple[str, int]] = []


@dataclass(frozen=True)
class CountingScorer(Scorer):
    """Scores a rank by its place, and writes down what it is asked."""

    sees_gradients = True
    own_backward = True
    validation_samples = 7

    def start(self, layers: AdapterLayers, run: TrainingInfo) -> State:
        CALLS.clear()
        return {"seen": torch.zeros(layers.total_rank)}

    def before_step(self, context: Context, state: State) -> None:
        CALLS.append(("before_step", context.step))

    def after_step(self, context: Context, state: State) -> None:
        CALLS.append(("after_step", context.step))

    def score(self, context: Context, state: State, choose: Choose) -> Scores:
        values, start = {}, 0.0
        for name, rank in context.layers.ranks.items():
            values[name] = torch.arange(start, start + rank)
            start += rank
        CALLS.append(("score", context.step))
        return Scores(values, {"chosen": [list(rank) for rank in choose(values)]})

    def after_resize(self, context: Context, state: State, origins: Tensor) -> None:
        CALLS.append(("after_resize", context.step))

    def end(self, context: Context, state: State) -> None:
        CALLS.append(("end", context.step))
        state.clear()


@settings(raises=ScheduleError)
class ByPlace(RoundAllocator):
    @property
    def scorer(self) -> Scorer:
        return CountingScorer()


QUICK: dict[str, Any] = {"k1": 2, "k2": 1, "rounds": 2, "unit": "steps", "per_round": 3}


def test_the_hooks_are_called_until_the_last_score_and_then_the_end() -> None:
    run_loop(ByPlace(**QUICK), 5)
    assert CALLS == [
        ("before_step", 0),
        ("after_step", 1),
        ("before_step", 1),
        ("after_step", 2),
        ("score", 2),
        ("after_resize", 2),
        ("before_step", 2),
        ("after_step", 3),
        ("score", 3),
        ("after_resize", 3),
        ("end", 3),
        ("end", 4),
        ("end", 5),
    ]


def test_the_scores_decide_and_the_scorer_knows_what_a_round_would_prune() -> None:
    ranks, _ = run_loop(ByPlace(**QUICK), 5)
    first = ranks.history.allocations[0]
    pruned = [[name, rank] for name, gone in first.pruned.items() for rank in gone]
    assert first.details["chosen"] == pruned
    scores = {name: torch.tensor(values) for name, values in first.scores.items()}
    plan = prune_and_reallocate(scores, 3, dict.fromkeys(scores, 32))
    assert first.ranks == {name: plan[name].rank if name in plan else len(scores[name]) for name in scores}


def test_what_the_scorer_needs_the_method_needs() -> None:
    method = ByPlace()
    assert method.sees_gradients
    assert method.own_backward
    assert method.validation_samples == 7
    assert not method.needs_validation_batch


def test_scores_per_parameter_are_divided_before_ranks_and_modules_are_compared() -> None:
    ranks, _ = run_loop(ByPlace(**QUICK, per_parameter=True), 5)
    first = ranks.history.allocations[0]
    pruned = [[name, rank] for name, gone in first.pruned.items() for rank in gone]
    assert first.details["chosen"] == pruned  # the scorer was told of the same order
    model = adapted(tiny_llama())
    by_hand, place = {}, 0
    for name, layer in find_layers(model).items():
        base = layer.module.get_base_layer()
        by_hand[name] = torch.arange(place, place + 4) / (base.in_features + base.out_features)
        place += 4
    assert {name: pytest.approx(values.tolist()) for name, values in by_hand.items()} == first.scores
    plan = prune_and_reallocate(by_hand, 3, dict.fromkeys(by_hand, 32))
    assert first.ranks == {name: plan[name].rank if name in plan else 4 for name in by_hand}
    plain, _ = run_loop(ByPlace(**QUICK), 5)
    assert plain.history.allocations[0].ranks != first.ranks


def test_only_modules_that_lose_ranks_are_turned() -> None:
    scores = {"a": torch.tensor([3.0, 0.1]), "b": torch.tensor([5.0, 4.0]), "c": torch.tensor([2.0])}
    bases = {name: Basis(torch.eye(len(values)), torch.eye(len(values))) for name, values in scores.items()}
    plan = prune_and_reallocate(scores, 1, dict.fromkeys(scores, 8), bases=bases)
    assert plan == {"a": LayerPlan((0,), basis=bases["a"]), "b": LayerPlan((0, 1), 1)}


def test_second_moments_of_new_ranks_are_filled() -> None:
    filled = {}
    for second_moments in ("zero", "mean"):
        ranks, _ = run_loop(ByPlace(**{**QUICK, "rounds": 1}, second_moments=second_moments), 5, until=2)
        given = ranks.history.allocations[0].added
        assert given
        filled[second_moments] = [
            bool(ranks.optimizer.state[ranks.layers[name].A]["exp_avg_sq"][-count:].any())
            for name, count in given.items()
        ]
    assert not any(filled["zero"])
    assert all(filled["mean"])


def test_new_ranks_along_the_gradient_begin_outside_of_the_present_ones() -> None:
    """At the step of the round, before any step with the new ranks."""
    largest = {}
    for new_ranks in ("random", "gradient"):
        method = ByPlace(**{**QUICK, "rounds": 1}, new_ranks=new_ranks)
        assert method.needs_validation_batch == (new_ranks == "gradient")
        ranks, _ = run_loop(method, 5, until=2)
        cosines = []
        for name, count in ranks.history.allocations[0].added.items():
            A = torch.nn.functional.normalize(ranks.layers[name].A.detach())
            cosines.append(float((A[-count:] @ A[:-count].T).abs().max()))
        largest[new_ranks] = max(cosines)
    assert largest["gradient"] < 1e-5 < largest["random"]


def test_new_ranks_along_the_gradient_need_data() -> None:
    model = adapted(tiny_llama())
    with pytest.raises(ValidationBatchError, match="validation_batch"):
        lorank.attach(model, adamw(model), ByPlace(new_ranks="gradient"), total_steps=10)


@pytest.mark.parametrize("stop", [1, 3])
def test_a_resumed_run_with_options_is_the_uninterrupted_one(stop: int) -> None:
    same_run(ByPlace(**QUICK, new_ranks="gradient", second_moments="mean", per_parameter=True), stop, 5)


def test_the_base_is_no_method_by_itself() -> None:
    with pytest.raises(TypeError, match="abstract"):
        RoundAllocator()  # type: ignore[abstract]
