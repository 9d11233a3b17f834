"""A short run of ALoRA in a loop of one's own, which can stop and go on from what it saved."""

from __future__ import annotations

from typing import Any

import torch

import lorank
from tests.models import adapted, tiny_llama, token_batch

QUICK = lorank.ALoRA(k1=2, k2=2, rounds=3, unit="steps", per_round=6, scores="exact")


def adamw(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, fused=True)


def run_loop(steps: range, checkpoint: dict[str, Any] | None, stop: int | None) -> tuple[list[float], Any, Any]:
    torch.manual_seed(5)
    model = adapted(tiny_llama(), random_B=False, lora_dropout=0.1)
    optimizer = adamw(model)
    ranks = lorank.attach(model, optimizer, QUICK, validation_batch=token_batch(seed=99), total_steps=10, seed=3)
    losses = []
    if checkpoint:
        model.load_state_dict(checkpoint["model"], strict=False)
        optimizer.load_state_dict(checkpoint["optimizer"])
        torch.set_rng_state(checkpoint["rng"])
    for step in steps:
        loss = model(**token_batch(seed=step)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        if step + 1 == stop:
            weights = {key: value for key, value in model.state_dict().items() if "lora_" in key}
            saved = {"model": weights, "optimizer": optimizer.state_dict(), "rng": torch.get_rng_state()}
            return losses, ranks, saved
    return losses, ranks, None
