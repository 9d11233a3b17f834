"""Singular values and vectors of the frozen weights' gradient, against the gradient that autograd forms."""

from __future__ import annotations

import pytest
import torch

import lorank
from lorank.errors import ValidationBatchError
from lorank.lora import find_layers
from lorank.scoring import WeightGradient, weight_gradient, weight_gradients
from tests.models import adapted, class_batch, tiny_bert, tiny_gpt2, tiny_llama, token_batch
from tests.scoring.weight_gradients import by_autograd

MODELS = {
    "llama": lambda: (adapted(tiny_llama(), random_B=False), token_batch(padded=True)),
    "bert": lambda: (adapted(tiny_bert(), random_B=False, task_type="SEQ_CLS"), class_batch(padded=True)),
    "gpt2": lambda: (adapted(tiny_gpt2(), random_B=False, fan_in_fan_out=True), token_batch()),
    "embedding": lambda: (
        adapted(tiny_llama(tie_word_embeddings=False), random_B=False, target_modules=["embed_tokens", "v_proj"]),
        token_batch(),
    ),
}


def orthonormal(vectors: torch.Tensor) -> None:
    identity = torch.eye(vectors.shape[1], dtype=vectors.dtype)
    torch.testing.assert_close(vectors.T @ vectors, identity, rtol=0, atol=1e-6)  # the range finder's are float32


def whole(one: WeightGradient) -> torch.Tensor:
    return one.left * one.values @ one.right.T


@pytest.mark.parametrize("kind", MODELS)
def test_whole_gradients_are_those_of_autograd(kind: str) -> None:
    model, batch = MODELS[kind]()
    layers = find_layers(model)
    batches = [batch, {key: value.flip(0) for key, value in batch.items()}, batch]
    expected = by_autograd(layers, batches)
    found = weight_gradients(model, layers, batches, 99)
    for name, layer in layers.items():
        one, G = found[name], expected[name]
        values = torch.linalg.svdvals(G)
        assert one.values.shape == (layer.max_rank,)
        assert one.left.shape == (layer.d_out, layer.max_rank)
        assert one.right.shape == (layer.d_in, layer.max_rank)
        torch.testing.assert_close(one.values, values, rtol=1e-4, atol=1e-6 * float(values[0]) + 1e-9)
        orthonormal(one.left)
        orthonormal(one.right)
        assert torch.linalg.norm(whole(one) - G) <= 1e-5 * torch.linalg.norm(G)
    few = weight_gradients(model, layers, batches, 3)
    for name in layers:
        for part in ("values", "left", "right"):
            torch.testing.assert_close(getattr(few[name], part), getattr(found[name], part)[..., :3])


@pytest.mark.parametrize("kind", MODELS)
def test_the_range_finder_comes_close_and_never_above(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_gradient, "FULL_GRADIENT_SIZE", 0)
    monkeypatch.setattr(weight_gradient, "OVERSAMPLING", 4)
    model, batch = MODELS[kind]()
    layers = find_layers(model)
    expected = by_autograd(layers, [batch])
    found = weight_gradients(model, layers, [batch], 4)
    sketched = [n for n, layer in layers.items() if layer.d_in * layer.d_out > 8 * (layer.d_in + layer.d_out)]
    assert sketched
    for name in sketched:
        one, G = found[name], expected[name]
        values = torch.linalg.svdvals(G)
        assert (one.values <= values[:4] * (1 + 1e-4) + 1e-9).all()
        assert float(one.values[0]) >= 0.8 * float(values[0])
        orthonormal(one.left)
        orthonormal(one.right)
        # What is left of G after the part that was found: hardly more than the best part of this rank leaves.
        best, left = torch.linalg.norm(values[4:]), torch.linalg.norm(G - whole(one))
        assert left <= 1.5 * best + 1e-5 * values[0]
        assert float(torch.linalg.norm(G @ one.right)) >= 0.9 * float(torch.linalg.norm(values[:4]))


def test_reserved_ranks_change_nothing() -> None:
    """With a pool the model computes with padded copies of A and B."""
    plain, roomy = (adapted(tiny_llama()).double() for _ in range(2))
    lorank.reserve_(roomy, 7)
    expected = weight_gradients(plain, find_layers(plain), [token_batch()], 4)
    found = weight_gradients(roomy, find_layers(roomy), [token_batch()], 4)
    for name, one in expected.items():
        assert float(one.values[0]) > 0
        torch.testing.assert_close(found[name].values, one.values, rtol=1e-5, atol=0)


def test_it_leaves_no_trace() -> None:
    model = adapted(tiny_llama(), random_B=False, lora_dropout=0.5).train()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    layers = find_layers(model)
    state = torch.get_rng_state()
    weight_gradients(model, layers, [token_batch()], 4)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in model.modules())
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in model.parameters())
    assert not any(layer.module._forward_hooks for layer in layers.values())


def test_no_batch() -> None:
    layers = find_layers(adapted(tiny_llama()))
    with pytest.raises(ValidationBatchError, match="no batch to take gradients on"):
        weight_gradients(layers.model, layers, [], 4)


@pytest.mark.parametrize("size", [2**18, 0], ids=["whole", "range finder"])
def test_vectors_are_orthonormal_where_the_gradient_has_no_directions_left(
    size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One token has a gradient of rank 1; in a part that the loss does not depend on it is zero."""
    monkeypatch.setattr(weight_gradient, "FULL_GRADIENT_SIZE", size)
    monkeypatch.setattr(weight_gradient, "OVERSAMPLING", 4)
    model = adapted(tiny_llama(), random_B=False, target_modules=["embed_tokens", "v_proj", "down_proj"])
    layers = find_layers(model)
    batch = token_batch(1, 2)
    found = weight_gradients(model, layers, [batch], 4)
    last = found["model.layers.1.mlp.down_proj"]
    assert float(last.values[1]) < 1e-6 * float(last.values[0])
    none = weight_gradients(model, layers, [batch], 4, loss_fn=lambda model, _: model(**batch).logits.sum() * 0)
    for one in (*found.values(), *none.values()):
        orthonormal(one.left)
        orthonormal(one.right)
    assert not any(one.values.any() for one in none.values())


def test_the_mean_over_processes_is_the_gradient_of_all_batches() -> None:
    """Two processes with a batch each: the mean of their sums, in both passes of the range finder."""
    model, layers = (made := adapted(tiny_llama(1), random_B=False)), find_layers(made)
    batches = [token_batch(seed=0), token_batch(seed=1)]
    expected = weight_gradients(model, layers, batches, 4)
    sums: list[torch.Tensor] = []
    weight_gradients(model, layers, [batches[1]], 4, mean=lambda values: sums.append(values) or values)
    others = iter(sums)
    found = weight_gradients(model, layers, [batches[0]], 4, mean=lambda values: (values + next(others)) / 2)
    for name in layers:
        torch.testing.assert_close(found[name].values, expected[name].values, rtol=1e-4, atol=1e-9)
