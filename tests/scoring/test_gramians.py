"""Gramians from a few batches: the units of one label's loss, and no trace in the model."""

from __future__ import annotations

import pytest
import torch

import lorank
from lorank.errors import ValidationBatchError
from lorank.lora import find_layers, fuse_
from lorank.scoring import measure_gramians
from tests.lora.test_gramians import twin_sums
from tests.models import adapted, class_batch, tiny_bert, tiny_llama, token_batch


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_they_are_those_of_one_label_s_loss(kind: str) -> None:
    """Z: the mean over tokens; D: N times the sum of ẑ ẑᵀ, the mean over batches; N labels in a batch's mean loss."""
    if kind == "llama":
        model, batches = adapted(tiny_llama()), [token_batch(padded=True), token_batch(2, seed=1)]
        labels = [int((one["labels"][:, 1:] != -100).sum()) for one in batches]
    else:
        model, batches = adapted(tiny_bert()), [class_batch(padded=True), class_batch(2)]
        labels = [4, 2]
    model.double().eval()
    sums = [twin_sums(model, [lambda b=one: model(**b).loss]) for one in batches]
    found = measure_gramians(model, find_layers(model), batches)
    for name, pair in found.items():
        Z = (sums[0][name][0] + sums[1][name][0]) / (sums[0][name][2] + sums[1][name][2])
        D = (labels[0] * sums[0][name][1] + labels[1] * sums[1][name][1]) / 2
        torch.testing.assert_close(pair.Z, Z, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(pair.D, D, rtol=1e-9, atol=1e-12)


def test_two_batches_of_one_size_are_their_union() -> None:
    model = adapted(tiny_llama()).double()
    layers, whole = find_layers(model), token_batch(6)
    halves = [{key: value[half] for key, value in whole.items()} for half in (slice(3), slice(3, 6))]
    for name, pair in measure_gramians(model, layers, halves).items():
        one = measure_gramians(model, layers, [whole])[name]
        torch.testing.assert_close(pair.Z, one.Z, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(pair.D, one.D, rtol=1e-9, atol=1e-12)


def test_reserved_ranks_change_nothing() -> None:
    """With a pool the model computes with padded copies of A and B."""
    plain, roomy = (adapted(tiny_llama()).double() for _ in range(2))
    lorank.reserve_(roomy, 7)
    expected = measure_gramians(plain, find_layers(plain), [token_batch()])
    for name, pair in measure_gramians(roomy, find_layers(roomy), [token_batch()]).items():
        assert float(pair.D.abs().max()) > 0
        torch.testing.assert_close(pair.Z, expected[name].Z, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(pair.D, expected[name].D, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("fused", [False, True])
def test_it_leaves_no_trace(fused: bool) -> None:
    model = adapted(tiny_llama(), lora_dropout=0.5, target_modules=["embed_tokens", "v_proj"]).train()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    layers = find_layers(model)
    if fused:
        fuse_(layers)
    hooks = [(len(module._forward_hooks), sorted(vars(module))) for module in model.modules()]
    state = torch.get_rng_state()
    measure_gramians(model, layers, [token_batch()])
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in model.modules())
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in model.parameters())
    assert [(len(module._forward_hooks), sorted(vars(module))) for module in model.modules()] == hooks


def test_progress_and_a_generator_of_batches() -> None:
    model, seen = adapted(tiny_llama(1)), []
    measure_gramians(
        model, find_layers(model), (token_batch(seed=i) for i in range(2)), progress=lambda *x: seen.append(x)
    )
    assert seen == [(1, 2), (2, 2)]


def test_errors_restore_the_model() -> None:
    model = adapted(tiny_llama(1)).train()
    layers = find_layers(model)
    with pytest.raises(ValidationBatchError, match="no batch to measure Gramians on"):
        measure_gramians(model, layers, [])
    with pytest.raises(ValidationBatchError, match="labels"):
        measure_gramians(model, layers, [token_batch(), {"input_ids": token_batch()["input_ids"]}])
    assert model.training
    assert not any(module._forward_hooks for module in model.modules())
