"""Scores in the balanced basis, against layers that are really turned."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from lorank.lora import AdapterLayers, LayerPlan, find_layers, resize_
from lorank.scoring import AblationScorer, Context, RotatedScorer, SensitivityScorer, TrainingInfo, balance
from lorank.scoring.gramians import measure_gramians
from tests.models import adapted, tiny_llama, token_batch

BATCH = token_batch(rows=6, seed=3)


def none(scores: object) -> tuple[()]:
    return ()


def context(layers: AdapterLayers) -> Context:
    return Context(5, TrainingInfo(10), layers.model, layers, BATCH)


@pytest.mark.parametrize("method", ["first_order", "exact"])
def test_the_scores_are_those_of_turned_layers(method: str) -> None:
    model = adapted(tiny_llama()).double()
    twin = copy.deepcopy(model)
    layers, turned = find_layers(model), find_layers(twin)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    inner = AblationScorer(method, "without")
    scorer = RotatedScorer(inner)
    found = scorer.score(context(layers), scorer.start(layers, TrainingInfo(10)), none)
    pairs = measure_gramians(twin, turned, [BATCH])
    bases = {name: balance(turned[name], pair).basis for name, pair in pairs.items()}
    resize_(turned, {name: LayerPlan(tuple(range(turned[name].rank)), basis=basis) for name, basis in bases.items()})
    expected = inner.score(context(turned), {}, none).values
    plain = inner.score(context(layers), {}, none).values
    assert any(not torch.allclose(plain[name], expected[name], rtol=1e-3) for name in layers)
    for name in layers:
        assert found.bases[name] == bases[name]
        torch.testing.assert_close(found.values[name], expected[name], rtol=1e-8, atol=1e-12)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), f"{key} was not restored"


def test_the_layers_are_turned_back_after_an_error() -> None:
    layers = find_layers(adapted(tiny_llama()))
    before = {name: layer.A.detach().clone() for name, layer in layers.items()}

    class Failing(AblationScorer):
        def score(self, context: Context, state: dict[str, Tensor], choose: object) -> None:  # type: ignore[override]
            assert not torch.equal(next(iter(context.layers.values())).A, next(iter(before.values())))
            raise RuntimeError("on purpose")

    scorer = RotatedScorer(Failing())
    with pytest.raises(RuntimeError, match="on purpose"):
        scorer.score(context(layers), scorer.start(layers, TrainingInfo(10)), none)
    assert all(torch.equal(layer.A, before[name]) for name, layer in layers.items())


def test_a_scorer_with_a_state_per_rank_is_refused() -> None:
    layers = find_layers(adapted(tiny_llama()))
    with pytest.raises(ValueError, match="SensitivityScorer keeps a state per rank"):
        RotatedScorer(SensitivityScorer()).start(layers, TrainingInfo(10))
