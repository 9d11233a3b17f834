"""Runs of a tiny model with three adapted kinds of projection, and what their optimisers save."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import lorank
from lorank.errors import ResumeError
from tests.methods import METHODS
from tests.models import adapted, tiny_llama, token_batch

TARGETS = ["q_proj", "v_proj", "up_proj"]


def begin(base: nn.Module | None = None, method: str = "alora", **lora: Any) -> tuple[Any, torch.optim.Optimizer, Any]:
    model = adapted(
        base or tiny_llama(), random_B=False, target_modules=TARGETS, **{**METHODS[method].lora, **lora}
    ).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    ranks = lorank.attach(model, optimizer, METHODS[method].make(), validation_batch=token_batch(), total_steps=12)
    return model, optimizer, ranks


def trained(method: str, steps: int) -> dict[str, Any]:
    model, optimizer, _ = begin(method=method)
    for step in range(steps):
        model(**token_batch(seed=step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer.state_dict()


def refused(saved: dict[str, Any], message: str, base: nn.Module | None = None) -> None:
    _, optimizer, ranks = begin(base)
    before = {name: layer.A.clone() for name, layer in ranks.layers.items()}
    with pytest.raises(ResumeError, match=message):
        optimizer.load_state_dict(saved)
    assert ranks.step == 0
    assert all(torch.equal(layer.A, before[name]) for name, layer in ranks.layers.items())
