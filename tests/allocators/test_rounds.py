"""Rounds with a scorer that somebody else has written: what it is asked, when, and what becomes of its scores."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from lorank.allocators import Context, State, TrainingInfo
from lorank.allocators.reallocation import prune_and_reallocate
from lorank.allocators.rounds import RoundAllocator
from lorank.allocators.settings import settings
from lorank.errors import ScheduleError
from lorank.lora import AdapterLayers
from lorank.scoring import Choose, Scorer, Scores
from tests.allocators.runs import run_loop

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


def test_the_base_is_no_method_by_itself() -> None:
    with pytest.raises(TypeError, match="abstract"):
        RoundAllocator()  # type: ignore[abstract]
