"""Weights over the budget lose the ranks with the smallest updates, with a warning."""

from __future__ import annotations

import torch

from lorank.allocators import Budget
from lorank.lora import find_layers
from lorank.training.budget_enforcement import prune_to_budget_
from tests.messages import warnings_of_lorank
from tests.models import adapted, tiny_llama, token_batch
from tests.training.loops import adamw


def test_the_ranks_with_the_smallest_updates_are_removed() -> None:
    model = adapted(tiny_llama(), alpha_pattern={"down_proj": 40})
    layers, optimizer = find_layers(model), adamw(model)
    model(**token_batch()).loss.backward()
    optimizer.step()
    sizes = {}  # of the update s · B_i A_i of each rank, by its own matrix
    for name, layer in layers.items():
        for rank in range(layer.rank):
            update = layer.scaling * torch.outer(layer.B[:, rank].detach().double(), layer.A[rank].detach().double())
            sizes[name, rank] = float(torch.linalg.matrix_norm(update))
    best = sorted(sizes, key=lambda key: sizes[key], reverse=True)[:20]
    kept = {name: [rank for rank in range(4) if (name, rank) in best] for name in layers}
    A = {name: layer.A.detach().clone() for name, layer in layers.items()}
    moments = {name: optimizer.state[layer.A]["exp_avg"].clone() for name, layer in layers.items()}
    with warnings_of_lorank() as messages:
        allocation = prune_to_budget_(layers, Budget(ranks=20).resolve(layers), optimizer)
    for name, layer in layers.items():
        assert torch.equal(layer.A, A[name][kept[name]])
        assert torch.equal(optimizer.state[layer.A]["exp_avg"], moments[name][kept[name]])
        for rank, size in enumerate(allocation.scores[name].tolist()):
            torch.testing.assert_close(size, sizes[name, rank], rtol=1e-12, atol=0)
    assert allocation.plan.keys() == {name for name in layers if len(kept[name]) < 4}
    assert allocation.details == {"cut": True}
    (message,) = messages
    assert "have 56 ranks, more than the budget allows" in message
    assert "20 are left" in message
