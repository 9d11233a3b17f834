"""Mixed precision: gradient scalers, the steps that they skip, and autocast, with every method."""

from __future__ import annotations

import itertools
import logging
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor

import lorank
from tests.methods import METHODS, STEPS, WITH_DORA, Method
from tests.models import adapted, tiny_llama, token_batch

OVERFLOWS = (2, 5, 6)
every_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)


class Loop:
    """A loop that accumulates two batches per step; in ``OVERFLOWS`` one gradient is made infinite."""

    def __init__(
        self, method: Method, scaler: torch.amp.GradScaler | None, *, fused: bool, wrapped: bool = False
    ) -> None:
        self.model = adapted(tiny_llama(), random_B=False, **method.lora).train()
        optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=1e-2, fused=fused)
        self.scaler = scaler
        self.optimizer: Any = optimizer
        if wrapped:
            Accelerator(cpu=True)
            self.optimizer = AcceleratedOptimizer(optimizer, device_placement=False, scaler=scaler)
        self.ranks = lorank.attach(
            self.model,
            self.optimizer,
            method.make(),
            validation_batch=token_batch(seed=99),
            total_steps=STEPS,
            seed=7,
            grad_scaler=None if wrapped else scaler,
        )
        self.losses: list[Tensor] = []

    def backward(self, i: int) -> None:
        for half in range(2):
            loss = self.model(**token_batch(seed=2 * i + half)).loss / 2
            self.losses.append(loss.detach())
            (loss if self.scaler is None else self.scaler.scale(loss)).backward()

    def run(self) -> Loop:
        i = 0
        while self.ranks.step < STEPS:
            self.backward(i)
            if i in OVERFLOWS:
                next(p for p in self.model.parameters() if p.grad is not None and p.numel()).grad.view(-1)[0] = (
                    torch.inf
                )
                if self.ranks.layers.gates is not None:
                    self.ranks.layers.gates.grad[0] = torch.inf
            if self.scaler is None:
                if i not in OVERFLOWS:
                    self.optimizer.step()
            elif isinstance(self.optimizer, AcceleratedOptimizer):
                self.optimizer.step()  # which updates its scaler
            else:
                self.scaler.step(self.optimizer)
                self.scaler.update()
            self.optimizer.zero_grad()
            i += 1
        assert i == STEPS + len(OVERFLOWS)
        return self


@pytest.mark.parametrize(
    ("name", "how"),
    [*((name, "fused") for name in METHODS), *itertools.product(["sora", "ard-heads"], ["for-loop", "accelerate"])],
)
def test_a_scaled_loss_changes_nothing(name: str, how: str) -> None:
    """Scales are powers of two, so the run is bitwise the one without; a step that is skipped is no step."""
    method, fused = METHODS[name], how == "fused"
    plain = Loop(method, None, fused=fused).run()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=2)
    scaled = Loop(method, scaler, fused=fused, wrapped=how == "accelerate").run()
    assert scaler.get_scale() != 2.0**12
    assert plain.losses == scaled.losses
    assert [r.ranks for r in plain.ranks.history] == [r.ranks for r in scaled.ranks.history]
    for (key, one), other in zip(plain.model.state_dict().items(), scaled.model.state_dict().values(), strict=True):
        assert torch.equal(one, other), key


@pytest.mark.parametrize("method", WITH_DORA.values(), ids=WITH_DORA)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_under_autocast(method: Method, dtype: torch.dtype) -> None:
    """float16 with a scale that overflows at first, as scalers begin; bfloat16 without one."""
    model = adapted(tiny_llama(), random_B=False, **method.lora).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24, enabled=dtype == torch.float16)
    ranks = lorank.attach(
        model,
        optimizer,
        method.make(),
        validation_batch=token_batch(seed=99),
        total_steps=2 * STEPS,
        seed=7,
        grad_scaler=scaler,
    )
    tried, losses = 0, []
    while ranks.step < 2 * STEPS:
        with torch.autocast("cpu", dtype):
            loss = model(**token_batch(seed=tried % 2)).loss
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        losses.append(loss.item())
        tried += 1
    skipped = tried - ranks.step
    assert 3 < skipped < 20 if dtype == torch.float16 else not skipped
    assert losses[-1] < losses[0]
    assert all(p.dtype == torch.float32 and torch.isfinite(p).all() for p in model.parameters())
    assert ranks.layers.gates is None
    if ranks.budget is not None:
        assert ranks.budget.fits(ranks.layers.ranks)


def test_float16_without_a_known_scaler_is_warned_of_once(caplog: pytest.LogCaptureFixture) -> None:
    method = METHODS["sora"]
    model = adapted(tiny_llama(), random_B=False, **method.lora).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    lorank.attach(model, optimizer, method.make(), total_steps=STEPS)
    with caplog.at_level(logging.WARNING, "lorank"), torch.autocast("cpu", torch.float16):
        for _ in range(2):
            model(**token_batch()).loss.backward()
    assert caplog.text.count("attach(…, grad_scaler=scaler)") == 1
