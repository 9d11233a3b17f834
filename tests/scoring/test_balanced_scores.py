"""Balanced scores on the way from the adapter to the base model: against a twin that scales the layers itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lorank.errors import ValidationBatchError
from lorank.lora import find_layers
from lorank.scoring import GramianPair, balance, balanced_scores, mean_loss, measure_gramians
from tests.models import adapted, tiny_gpt2, tiny_llama, token_batch

BATCHES = [token_batch(rows=3, seed=seed) for seed in (1, 2)]


@pytest.mark.parametrize(
    ("make", "settings"),
    [
        (tiny_llama, {"target_modules": ["q_proj", "down_proj"]}),
        (tiny_llama, {"target_modules": ["q_proj", "down_proj"], "use_dora": True}),
        (tiny_llama, {"target_modules": ["embed_tokens", "o_proj"]}),
        (tiny_gpt2, {"target_modules": ["c_attn"], "fan_in_fan_out": True}),
    ],
    ids=["plain", "dora", "embedding", "conv1d"],
)
def test_gramians_are_averaged_over_the_path(make: Any, settings: dict) -> None:
    model = adapted(make(), **settings).double().eval()
    layers = find_layers(model)
    path = (1.0, 0.5, 0.2)
    found = balanced_scores(model, layers, BATCHES, path=path)
    measured = []
    for factor in path:
        for layer in layers.values():
            layer.module.scaling["default"] *= factor
        measured.append(measure_gramians(model, layers, BATCHES))
        for layer in layers.values():
            layer.module.scaling["default"] /= factor
    for name, layer in layers.items():
        Z = sum(pairs[name].Z for pairs in measured) / 3
        # ẑ holds the factor s, and so D its square
        D = sum(pairs[name].D / factor**2 for pairs, factor in zip(measured, path, strict=True)) / 3
        expected = balance(layer, GramianPair(Z, D)).worth
        torch.testing.assert_close(found[name].worth, expected, rtol=1e-7, atol=1e-12)
        assert layer.gate is None


def test_gates_come_back_and_count() -> None:
    model = adapted(tiny_llama(), target_modules=["q_proj"]).double().eval()
    layers = find_layers(model)
    gates = {name: torch.rand(4, dtype=torch.float64) for name in layers}
    for name, layer in layers.items():
        layer.gate = gates[name]
    found = balanced_scores(model, layers, BATCHES)
    assert all(layer.gate is gates[name] for name, layer in layers.items())
    for name, layer in layers.items():
        layer.gate = None
        layer.B.data *= gates[name]
    expected = balanced_scores(model, layers, BATCHES)
    for name in layers:
        torch.testing.assert_close(found[name].worth, expected[name].worth, rtol=1e-9, atol=1e-14)


def test_gates_come_back_after_an_error() -> None:
    model = adapted(tiny_llama(), target_modules=["q_proj"]).eval()
    layers = find_layers(model)
    seen = []

    def loss_fn(model: Any, batch: Any) -> torch.Tensor:
        seen.append(next(iter(layers.values())).gate)
        if len(seen) == 2:
            raise RuntimeError("no more")
        return model(**batch).loss

    with pytest.raises(ValidationBatchError, match="no more"):
        balanced_scores(model, layers, BATCHES[:1], loss_fn=loss_fn)
    assert seen[0] is None
    assert seen[1].tolist() == [0.5] * 4
    assert all(layer.gate is None for layer in layers.values())


@pytest.mark.parametrize("path", [(), (0.0, 1.0), (1.5,)])
def test_a_path_that_leads_elsewhere(path: tuple[float, ...]) -> None:
    model = adapted(tiny_llama(), target_modules=["q_proj"])
    with pytest.raises(ValidationBatchError, match="expected factors of the update above 0"):
        balanced_scores(model, find_layers(model), BATCHES, path=path)


def test_the_mean_loss_of_a_user_s_own_function_counts_batches_by_their_labels() -> None:
    model = adapted(tiny_llama(), target_modules=["q_proj"])
    batches = [{"x": torch.ones(1), "labels": torch.zeros(3)}, {"x": torch.zeros(1), "labels": torch.zeros(1)}]
    found = mean_loss(model, find_layers(model), batches, loss_fn=lambda _, batch: batch["x"].sum())
    assert found == pytest.approx(0.75)
