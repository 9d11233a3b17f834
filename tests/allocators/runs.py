"""Short runs of a tiny Llama for the tests of every method: one straight, one that is stopped and resumed."""

from __future__ import annotations

import io
from typing import Any

import torch

import lorank
from lorank.allocators import Allocator
from tests.models import adapted, tiny_llama, token_batch

SHORT = 10


def adamw(model: torch.nn.Module, **settings: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], **{"lr": 1e-2, **settings})


def run_loop(
    allocator: Allocator, steps: int, *, until: int | None = None, checkpoint: dict[str, Any] | None = None, **lora: Any
) -> tuple[Any, list[float]]:
    """Trains a new adapter, with dropout and a learning rate that falls, from the checkpoint's step to ``until``.

    Returns:
        The running object, which has an attribute ``saved`` with what a loop would keep, and the losses.
    """
    torch.manual_seed(5)
    model = adapted(tiny_llama(), **{"random_B": False, "lora_dropout": 0.1, **lora})
    optimizer = adamw(model)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, steps)
    ranks = lorank.attach(
        model, optimizer, allocator, validation_batch=token_batch(rows=6, seed=99), total_steps=steps, seed=3
    )
    if checkpoint is not None:
        model.load_state_dict(checkpoint["model"], strict=False)
        optimizer.load_state_dict(checkpoint["optimizer"])
        schedule.load_state_dict(checkpoint["schedule"])
        torch.set_rng_state(checkpoint["random"])
    losses = []
    for step in range(ranks.step, steps if until is None else until):
        loss = model(**token_batch(seed=step)).loss
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    weights = {key: value for key, value in model.state_dict().items() if "lora_" in key}
    parts = {"model": weights, "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}
    file = io.BytesIO()
    torch.save({**parts, "random": torch.get_rng_state()}, file)
    file.seek(0)
    ranks.saved = torch.load(file, weights_only=True)
    return ranks, losses


def same_run(allocator: Allocator, stop: int, steps: int = SHORT, **lora: Any) -> None:
    """Asserts that a run that is stopped after ``stop`` steps and resumed is the uninterrupted one, bit for bit."""
    whole, straight = run_loop(allocator, steps, **lora)
    assert len(whole.history.allocations) > 1, "nothing was allocated: the test would show nothing"
    part, first = run_loop(allocator, steps, until=stop, **lora)
    resumed, second = run_loop(allocator, steps, checkpoint=part.saved, **lora)
    assert first + second == straight
    assert resumed.layers.ranks == whole.layers.ranks
    for name, layer in whole.layers.items():
        assert torch.equal(layer.A, resumed.layers[name].A)
        assert torch.equal(layer.B, resumed.layers[name].B)
    late = [record for record in whole.history.allocations if record.step > stop]
    assert [record.scores for record in resumed.history.allocations if record.step > stop] == [
        record.scores for record in late
    ]
