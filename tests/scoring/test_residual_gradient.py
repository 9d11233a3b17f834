"""The residual gradient, against the gradient that autograd forms, projected block by block."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from lorank.errors import ValidationBatchError
from lorank.lora import AdapterLayers, find_layers
from lorank.scoring import residual_gradients, weight_gradient
from tests.lora.forms import OUT, Q, in_heads
from tests.models import adapted, tiny_gpt2, tiny_llama, token_batch
from tests.scoring.weight_gradients import by_autograd

BATCHES = [token_batch(padded=True), token_batch(seed=1)]
PLAIN = {
    "llama": lambda: adapted(tiny_llama()),
    "gpt2": lambda: adapted(tiny_gpt2(), fan_in_fan_out=True),
    "embedding": lambda: adapted(tiny_llama(tie_word_embeddings=False), target_modules=["embed_tokens", "v_proj"], r=3),
}


def gradients_of(layers: AdapterLayers) -> dict[str, Tensor]:
    """G of the mean loss over BATCHES, (d_out, d_in) float64."""
    found = by_autograd(layers, BATCHES)
    for name, layer in layers.items():
        assert found[name].shape == (layer.d_out, layer.d_in)
    return found


def outside(space: Tensor) -> Tensor:
    """I − P, where P projects onto the row space of ``space``, (r, d)."""
    return torch.eye(space.shape[1], dtype=torch.float64) - torch.linalg.pinv(space) @ space


def blocks(layers: AdapterLayers, name: str, G: Tensor) -> Iterator[Tensor]:
    """The residual gradient of each group of a layer, by pseudo-inverses."""
    layer = layers[name]
    A, B = layer.A.detach().double(), layer.B.detach().double()
    if layer.is_embedding:
        yield outside(B.T) @ G
    elif layer.groups is None:
        yield G @ outside(A)
    else:
        for head, part in enumerate(torch.split(A, layer.head_ranks)):
            own = layer.groups.span(head)
            yield (G[own] if layer.groups.kind == "rows" else G[:, own]) @ outside(part)


def check(layers: AdapterLayers, *, relative: float) -> None:
    layers.model.double()
    expected = gradients_of(layers)
    layers.model.float()
    counts = {name: [3] * len(layer.head_ranks) for name, layer in layers.items()}
    found = residual_gradients(layers.model, layers, BATCHES, counts)
    for name, of_groups in found.items():
        for group, G in enumerate(blocks(layers, name, expected[name])):
            values = torch.linalg.svdvals(G)
            scale = float(expected[name].norm())
            one = of_groups[group]
            torch.testing.assert_close(one.values, values[:3], rtol=relative, atol=1e-5 * scale)
            # vectors of close values may mix: each pair must reproduce the value in the true block
            for i in range(3):
                if values[i] > 1e-4 * scale:
                    assert float(one.left[:, i] @ G @ one.right[:, i]) >= float(values[i]) * (1 - relative)


@pytest.mark.parametrize("kind", PLAIN)
def test_of_plain_layers(kind: str) -> None:
    check(find_layers(PLAIN[kind]()), relative=1e-3)


def test_of_heads() -> None:
    _, layers, _ = in_heads()
    assert {layers[Q].groups.kind, layers[OUT].groups.kind} == {"rows", "columns"}
    check(layers, relative=1e-3)


@pytest.mark.parametrize("kind", PLAIN)
def test_the_range_finder_comes_close(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_gradient, "FULL_GRADIENT_SIZE", 0)
    monkeypatch.setattr(weight_gradient, "OVERSAMPLING", 10)
    layers = find_layers(PLAIN[kind]())
    assert any(13 * (layer.d_in + layer.d_out) < layer.d_in * layer.d_out for layer in layers.values())
    check(layers, relative=0.3)


def test_right_vectors_are_orthogonal_to_A_also_where_the_range_finder_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    for limit in (weight_gradient.FULL_GRADIENT_SIZE, 0):
        monkeypatch.setattr(weight_gradient, "FULL_GRADIENT_SIZE", limit)
        monkeypatch.setattr(weight_gradient, "OVERSAMPLING", 4)
        layers = find_layers(adapted(tiny_llama()))
        found = residual_gradients(layers.model, layers, BATCHES, {name: [4] for name in layers})
        for name, layer in layers.items():
            right = found[name][0].right
            assert float((layer.A.detach().double() @ right).abs().max()) < 1e-6 * float(layer.A.detach().norm())


def test_what_the_ranks_reach_in_full_leaves_nothing() -> None:
    layers = find_layers(adapted(tiny_llama(), target_modules=["q_proj"], r=32))
    found = residual_gradients(layers.model, layers, BATCHES, {name: [2] for name in layers})
    assert all(float(of_groups[0].values.max()) == 0 for of_groups in found.values())


def test_only_the_groups_that_are_asked_for() -> None:
    _, layers, _ = in_heads()
    found = residual_gradients(layers.model, layers, BATCHES, {Q: [0, 2, 0, 1]})
    assert {group: len(one.values) for group, one in found[Q].items()} == {1: 2, 3: 1}
    assert list(found) == [Q]
    with pytest.raises(ValidationBatchError, match="no batch"):
        residual_gradients(layers.model, layers, [], {Q: [1, 0, 0, 0]})
