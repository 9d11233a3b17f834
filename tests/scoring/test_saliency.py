"""First-order sensitivity against gates that really are there, and against differences of losses."""

from __future__ import annotations

import pytest
import torch

from lorank.errors import ValidationBatchError
from lorank.lora import AdapterLayers, find_layers
from lorank.scoring import saliency_scores, validation_loss
from tests.models import adapted, class_batch, tiny_bert, tiny_llama, token_batch


def double(model) -> AdapterLayers:
    return find_layers(model.double())


def test_it_is_the_gradient_of_a_gate_of_ones() -> None:
    layers = double(adapted(tiny_llama()))
    batches = [token_batch(padded=True), token_batch(seed=1)]
    scores = saliency_scores(layers.model, layers, batches)
    expected = {name: torch.zeros(layer.rank, dtype=torch.float64) for name, layer in layers.items()}
    layers.model.eval()
    for batch in batches:
        gates = layers.learn_gates(torch.ones(layers.total_rank, dtype=torch.float64))
        layers.model(**batch).loss.backward()
        for name, leaf in gates.leaves.items():
            expected[name] += leaf.grad.abs() / len(batches)
        layers.drop_gates()
    for name, values in scores.items():
        assert values.shape == (4,)
        torch.testing.assert_close(values, expected[name], rtol=1e-9, atol=1e-12)
        assert values.max() > 1e-6


def test_it_predicts_what_a_slightly_closed_gate_does_to_the_loss() -> None:
    layers = double(adapted(tiny_bert(), task_type="SEQ_CLS", target_modules=["query", "dense"]))
    batch = class_batch(padded=True)
    scores = saliency_scores(layers.model, layers, [batch])
    name = max(scores, key=lambda n: float(scores[n].max()))
    rank, step = int(scores[name].argmax()), 1e-4
    losses = []
    for sign in (1, -1):
        gate = torch.ones(layers[name].rank, dtype=torch.float64)
        gate[rank] += sign * step
        layers[name].gate = gate
        losses.append(validation_loss(layers.model, layers, batch))
    layers[name].gate = None
    assert abs(losses[0] - losses[1]) / (2 * step) == pytest.approx(float(scores[name][rank]), rel=1e-4)


def test_it_leaves_no_trace_and_needs_no_trainable_adapter() -> None:
    model = adapted(tiny_llama(), lora_dropout=0.5)
    layers = find_layers(model.train())
    first = next(iter(layers.values()))
    first.A.grad = torch.ones_like(first.A)
    trained = saliency_scores(model, layers, [token_batch()])
    assert model.training
    assert all(A.requires_grad for layer in layers.values() for A in (layer.A, layer.B))
    assert torch.equal(first.A.grad, torch.ones_like(first.A))
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    frozen = saliency_scores(model, layers, [token_batch()])
    assert not any(parameter.requires_grad for parameter in model.parameters())
    for name in trained:
        assert torch.equal(trained[name], frozen[name])


def test_magnitudes_are_averaged_over_batches() -> None:
    layers = double(adapted(tiny_llama()))
    one, two = token_batch(), token_batch(seed=1)
    both = saliency_scores(layers.model, layers, [one, two])
    apart = [saliency_scores(layers.model, layers, [batch]) for batch in (one, two)]
    for name in both:
        torch.testing.assert_close(both[name], (apart[0][name] + apart[1][name]) / 2)


@pytest.mark.parametrize(
    ("batches", "message"),
    [([], "no batch"), ([{"input_ids": torch.ones(1, 4, dtype=torch.long)}], "returned no loss")],
)
def test_batches_that_will_not_do(batches, message: str) -> None:
    layers = find_layers(adapted(tiny_llama()))
    with pytest.raises(ValidationBatchError, match=message):
        saliency_scores(layers.model, layers, batches)
