"""Ablation as a scorer: each way to find the scores, and what it needs for that."""

from __future__ import annotations

import pytest

from lorank.errors import ValidationBatchError
from lorank.lora import find_layers
from lorank.scoring import AblationScorer, Context, TrainingInfo, ablation_scores
from tests.models import adapted, tiny_llama, token_batch


def test_without_a_batch_it_is_refused() -> None:
    layers = find_layers(adapted(tiny_llama()))
    with pytest.raises(ValidationBatchError, match="fixed batch of validation data: give validation_batch"):
        AblationScorer().score(Context(1, TrainingInfo(10), layers.model, layers), {}, lambda scores: [])


def test_an_unknown_method_is_refused() -> None:
    layers = find_layers(adapted(tiny_llama()))
    context = Context(1, TrainingInfo(10), layers.model, layers, validation_batch=token_batch())
    with pytest.raises(ValueError, match="method is 'guess'; expected one of first_order, exact, screen"):
        AblationScorer("guess").score(context, {}, lambda scores: [])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("scorer", "samples", "backward"),
    [
        (AblationScorer(), 128, True),
        (AblationScorer("exact"), 32, False),
        (AblationScorer("screen"), 32, True),
        (AblationScorer("exact", samples=5), 5, False),
    ],
)
def test_what_it_needs_of_the_run(scorer: AblationScorer, samples: int, backward: bool) -> None:
    assert scorer.needs_validation_batch
    assert not scorer.sees_gradients
    assert scorer.validation_samples == samples
    assert scorer.own_backward == backward


def test_screening_evaluates_the_ranks_that_would_go_exactly() -> None:
    model = adapted(tiny_llama(), r=2)
    layers, batch = find_layers(model), token_batch(padded=True)
    context = Context(1, TrainingInfo(10), model, layers, validation_batch=batch)
    last = next(reversed(list(layers)))
    found = AblationScorer("screen").score(context, {}, lambda scores: [(last, 1)])
    exact = ablation_scores(model, layers, batch)
    assert found.values[last][1] == pytest.approx(float(exact.scores[last][1]), abs=1e-6)
    assert found.details["scored_by"] == "screen"
