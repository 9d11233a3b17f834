"""ARD-LoRA's last resize under a budget."""

from __future__ import annotations

import torch

import lorank
from lorank.allocators import ARDLoRA
from tests.allocators.runs import adamw
from tests.models import adapted, tiny_llama, token_batch


def test_the_last_resize_uses_the_whole_budget() -> None:
    """Every module's r0·α is below ½ but two: rounded one by one, all others would go, and leave the budget unused."""
    model = adapted(tiny_llama(), r=4)
    optimizer = adamw(model)
    ard = ARDLoRA(heads="module", min_rank=0, alpha_lr=1e-12, resize_every=100, budget="8 ranks")
    ranks = lorank.attach(model, optimizer, ard, validation_batch=token_batch(rows=2), total_steps=3, seed=3)
    wanted = torch.linspace(0.1, 0.45, len(ranks.layers), dtype=torch.float64)
    wanted[1], wanted[4] = 1.3, 2.2
    for step in range(3):
        if step == 2:
            ranks.state["alpha"].copy_(wanted / ranks.state["r0"])
        model(**token_batch(seed=step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    names = list(ranks.layers)
    expected = dict.fromkeys(names, 0)
    scores = [(float(wanted[group]) - i, group) for group in range(len(names)) for i in range(4)]
    for _, group in sorted(scores, reverse=True)[:8]:
        expected[names[group]] += 1
    assert ranks.layers.ranks == expected
    assert sum(expected.values()) == 8
