"""Singular values of the frozen weights' gradient, against the gradient that autograd forms."""

from __future__ import annotations

import pytest
import torch

from lorank.errors import ValidationBatchError
from lorank.lora import AdapterLayers, find_layers
from lorank.scoring import weight_gradient, weight_gradient_singular_values
from tests.models import adapted, class_batch, tiny_bert, tiny_gpt2, tiny_llama, token_batch

MODELS = {
    "llama": lambda: (adapted(tiny_llama(), random_B=False), token_batch(padded=True)),
    "bert": lambda: (adapted(tiny_bert(), random_B=False, task_type="SEQ_CLS"), class_batch(padded=True)),
    "gpt2": lambda: (adapted(tiny_gpt2(), random_B=False, fan_in_fan_out=True), token_batch()),
    "embedding": lambda: (
        adapted(tiny_llama(tie_word_embeddings=False), random_B=False, target_modules=["embed_tokens", "v_proj"]),
        token_batch(),
    ),
}


def by_autograd(layers: AdapterLayers, batches) -> dict[str, torch.Tensor]:
    weights = [layer.module.get_base_layer().weight for layer in layers.values()]
    for weight in weights:
        weight.requires_grad_(True)
    loss = sum(layers.model.eval()(**batch).loss for batch in batches) / len(batches)
    gradients = torch.autograd.grad(loss, weights)
    for weight in weights:
        weight.requires_grad_(False)
    return {name: torch.linalg.svdvals(g.double()) for name, g in zip(layers, gradients, strict=True)}


@pytest.mark.parametrize("kind", MODELS)
def test_whole_gradients_are_those_of_autograd(kind: str) -> None:
    model, batch = MODELS[kind]()
    layers = find_layers(model)
    batches = [batch, {key: value.flip(0) for key, value in batch.items()}, batch]
    expected = by_autograd(layers, batches)
    found = weight_gradient_singular_values(model, layers, batches, 99)
    for name, layer in layers.items():
        assert found[name].shape == (layer.max_rank,)
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-6 * float(expected[name][0]) + 1e-9)
    few = weight_gradient_singular_values(model, layers, batches, 3)
    assert all(torch.equal(few[name], found[name][:3]) for name in layers)


@pytest.mark.parametrize("kind", MODELS)
def test_the_range_finder_comes_close_and_never_above(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_gradient, "FULL_GRADIENT_SIZE", 0)
    monkeypatch.setattr(weight_gradient, "OVERSAMPLING", 4)
    model, batch = MODELS[kind]()
    layers = find_layers(model)
    expected = by_autograd(layers, [batch])
    found = weight_gradient_singular_values(model, layers, [batch], 4)
    sketched = [n for n, layer in layers.items() if layer.d_in * layer.d_out > 8 * (layer.d_in + layer.d_out)]
    assert sketched
    for name in sketched:
        assert (found[name] <= expected[name][:4] * (1 + 1e-4) + 1e-9).all()
        assert float(found[name][0]) >= 0.8 * float(expected[name][0])


def test_it_leaves_no_trace() -> None:
    model = adapted(tiny_llama(), random_B=False, lora_dropout=0.5).train()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    layers = find_layers(model)
    state = torch.get_rng_state()
    weight_gradient_singular_values(model, layers, [token_batch()], 4)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in model.modules())
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in model.parameters())
    assert not any(layer.module._forward_hooks for layer in layers.values())


def test_no_batch() -> None:
    layers = find_layers(adapted(tiny_llama()))
    with pytest.raises(ValidationBatchError, match="no batch to take gradients on"):
        weight_gradient_singular_values(layers.model, layers, [], 4)
