"""New gates on a trained adapter do not move its outputs."""

from __future__ import annotations

import torch

from lorank.lora import compensate_gates_, find_layers
from tests.models import adapted, tiny_llama, token_batch


def test_gates_of_any_size_do_not_move_the_outputs() -> None:
    model = adapted(tiny_llama()).double().eval()
    layers = find_layers(model)
    batch = token_batch(seed=5)
    with torch.no_grad():
        before = model(**batch).logits
        gates = torch.rand(layers.total_rank, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.05
        layers.learn_gates(gates)
        assert (model(**batch).logits - before).abs().max() > 0.01
        compensate_gates_(layers)
        assert (model(**batch).logits - before).abs().max() < 1e-6  # the norms of the tiny Llama are in float32


def test_gates_of_one_and_zero_change_nothing_and_neither_do_gates_of_an_untrained_adapter() -> None:
    for random_B, value in ((True, None), (True, 0.0), (False, 0.5)):
        layers = find_layers(adapted(tiny_llama(), random_B=random_B))
        before = {name: layer.B.detach().clone() for name, layer in layers.items()}
        layers.learn_gates(None if value is None else torch.full((layers.total_rank,), value))
        compensate_gates_(layers)
        assert all(torch.equal(layers[name].B, B) for name, B in before.items())
