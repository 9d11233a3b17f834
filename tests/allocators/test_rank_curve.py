"""The rank curve: its numbers against the cut itself, its knee, and the LoraConfig of any point."""

from __future__ import annotations

import copy
import json
from itertools import pairwise
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import lorank
from lorank.allocators import Budget, RankCurve, truncate_
from lorank.errors import BudgetError, ValidationBatchError
from lorank.lora import LayerPlan, find_layers, resize_
from lorank.scoring import balanced_scores
from tests.models import adapted, tiny_bert, tiny_gpt2, tiny_llama, token_batch

BATCHES = [token_batch(rows=3, seed=seed) for seed in (1, 2)]


@pytest.fixture(scope="module")
def model() -> Any:
    return adapted(tiny_llama(), r=8, target_modules=["q_proj", "v_proj", "down_proj"]).eval()


@pytest.fixture(scope="module")
def curve(model: Any) -> RankCurve:
    return lorank.rank_curve(model, BATCHES)


@torch.no_grad()
def test_the_loss_of_the_whole_adapter_counts_labels(model: Any) -> None:
    padded = [token_batch(rows=3, padded=True), token_batch(rows=1, length=5, seed=4)]
    logits = [model(input_ids=b["input_ids"], attention_mask=b["attention_mask"]).logits for b in padded]
    losses = torch.cat([
        nn.functional.cross_entropy(out[:, :-1].flatten(0, 1), b["labels"][:, 1:].flatten(), reduction="none")
        for out, b in zip(logits, padded, strict=True)
    ])  # fmt: skip
    counted = torch.cat([b["labels"][:, 1:].flatten() for b in padded]) != -100
    found = lorank.rank_curve(model, padded).loss
    assert found == pytest.approx(float(losses[counted].mean()), abs=1e-5)


def test_every_point_is_what_a_cut_keeps_and_predicts(model: Any, curve: RankCurve) -> None:
    for point in curve.points[:-1:2]:
        cut = copy.deepcopy(model)
        layers = find_layers(cut)
        budget = Budget(parameters=point.parameters).resolve(layers)
        (stage,) = truncate_(cut, layers, BATCHES, budget, stages=1)
        assert stage.ranks == point.ranks
        assert layers.parameters == point.parameters
        assert point.loss - curve.loss == pytest.approx(stage.predicted, rel=1e-6)


def test_the_curve_falls_to_the_present_loss(curve: RankCurve) -> None:
    sizes, losses = [p.parameters for p in curve.points], [p.loss for p in curve.points]
    assert sizes == sorted(set(sizes))
    assert losses == sorted(losses, reverse=True)
    assert curve.points[-1].loss == curve.loss
    assert curve.points[-1].share == 1
    ratios = [b / a for a, b in pairwise(sizes)]
    assert max(ratios[-6:]) < 1.6  # √2 and what whole ranks round away
    assert curve.points[0].share < 0.05


def test_the_model_is_not_changed(model: Any) -> None:
    before = copy.deepcopy(model.state_dict())
    lorank.rank_curve(model, BATCHES)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_knee_is_where_the_worth_ends(model: Any) -> None:
    """σ² that are large for some ranks and small for all others: the knee is where the large ones fit."""
    layers = find_layers(model)
    worth = {name: torch.full((8,), 1e-4, dtype=torch.float64) for name in layers}
    worth[next(iter(layers))][:4] = 1.0
    knee = RankCurve(layers, worth, loss=2.0).knee
    first = layers[next(iter(layers))]
    assert knee.ranks[first.name] >= 4
    assert 4 * first.rank_parameters <= knee.parameters < 4 * first.rank_parameters * 2**0.5 + first.rank_parameters
    assert RankCurve(layers, {n: 0 * w for n, w in worth.items()}, 2.0).knee.share < 0.05  # nothing is worth anything


def test_any_point_by_name_share_or_budget(curve: RankCurve) -> None:
    assert curve.at("knee") is curve.knee
    half = curve.at("50%")
    assert 0.45 < half.share <= 0.5
    assert curve.at("50% of adapter") == half
    assert sum(curve.at("9 ranks").ranks.values()) == 9
    assert curve.at({"parameters": half.parameters}) == half
    assert curve.at("100%").ranks == curve.points[-1].ranks
    assert max(curve.at({"percent_of_adapter": 30, "max_lora_rank": 3}).ranks.values()) == 3
    json.dumps(curve.to_dict())


@pytest.mark.parametrize(
    ("at", "message"),
    [("bend", "'bend': expected 8 .*'knee', '50%' or such a budget"), ("60 ranks", "more than the measured adapter")],
)
def test_points_that_are_not_there(curve: RankCurve, at: str, message: str) -> None:
    with pytest.raises(BudgetError, match=message):
        curve.at(at)


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, {"alpha_pattern": {"q_proj": 5}}])
@pytest.mark.parametrize("at", ["knee", "20%", "5 ranks"])
def test_a_fresh_adapter_has_the_ranks_and_the_factors(settings: dict, at: str) -> None:
    model = adapted(tiny_llama(), r=8, target_modules=["q_proj", "v_proj", "down_proj"], **settings).eval()
    scalings = {name: layer.scaling for name, layer in find_layers(model).items()}
    curve = lorank.rank_curve(model, BATCHES)
    config = json.loads(json.dumps(curve.lora_config(at)))
    fresh = find_layers(get_peft_model(tiny_llama(), LoraConfig(task_type="CAUSAL_LM", **config)))
    assert fresh.ranks == {name: rank for name, rank in curve.at(at).ranks.items() if rank}
    for name, layer in fresh.items():
        assert layer.scaling == pytest.approx(scalings[name])


def test_a_name_that_ends_like_another() -> None:
    """``fc`` of one block would also match ``block.fc``, which receives no rank."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.block = nn.Linear(6, 6), nn.ModuleDict({"fc": nn.Linear(6, 6)})

        def forward(self, x: torch.Tensor, labels: torch.Tensor) -> Any:
            return {"loss": (self.block["fc"](self.fc(x)) - labels).square().mean()}

    model = adapted(Net(), r=2, target_modules=["fc"])
    layers = find_layers(model)
    worth = {name: torch.full((2,), float(name == "fc"), dtype=torch.float64) for name in layers}
    config = RankCurve(layers, worth, 1.0).lora_config("2 ranks")
    assert list(find_layers(get_peft_model(Net(), LoraConfig(**config)))) == ["fc"]


@pytest.mark.parametrize(
    ("make", "settings"),
    [
        (tiny_llama, {"use_dora": True, "target_modules": ["q_proj", "o_proj"]}),
        (tiny_llama, {"target_modules": ["embed_tokens", "o_proj"]}),
        (tiny_gpt2, {"target_modules": ["c_attn"], "fan_in_fan_out": True}),
        (tiny_bert, {"target_modules": ["query"]}),
    ],
    ids=["dora", "embedding", "conv1d", "classifier"],
)
def test_other_kinds_of_layers(make: Any, settings: dict) -> None:
    model = adapted(make(), **settings)
    batches = [{**BATCHES[0], "labels": torch.arange(3)}] if make is tiny_bert else BATCHES
    found = lorank.rank_curve(model, batches)
    assert found.points[0].loss > found.loss
    minima = {name: layer.min_rank for name, layer in find_layers(model).items()}
    assert all(rank >= minima[name] for point in found.points for name, rank in point.ranks.items())


def test_a_module_of_rank_0_stays_there() -> None:
    model = adapted(tiny_llama(), target_modules=["q_proj", "v_proj"])
    layers = find_layers(model)
    name = next(iter(layers))
    resize_(layers, {name: LayerPlan(())})
    curve = lorank.rank_curve(model, BATCHES)
    assert {point.ranks[name] for point in curve.points} == {0}
    assert curve.points[-1].ranks == layers.ranks
    assert balanced_scores(model, layers, BATCHES)[name].worth.shape == (0,)


def test_no_batch() -> None:
    with pytest.raises(ValidationBatchError, match="no batch to measure the rank curve on"):
        lorank.rank_curve(adapted(tiny_llama()), [])
