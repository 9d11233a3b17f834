"""A run notifies its integrations in order, starts all of them or none, and ends them in reverse."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import lorank
from lorank.allocators import ALoRASensi
from lorank.errors import LorankError
from lorank.lora import find_layers
from lorank.training.integrations.base import Integrations
from lorank.training.run_state import RunState
from tests.models import adapted, tiny_llama
from tests.training.integrations.noting import HOOKS, Noting

ROUNDS: dict[str, Any] = {"k1": 2, "k2": 5, "rounds": 1, "unit": "steps", "per_round": 4}


def adamw(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)


def a_run() -> RunState:
    model = adapted(tiny_llama(), random_B=False).train()
    info = lorank.allocators.TrainingInfo(10)
    return RunState(find_layers(model), model, adamw(model), ALoRASensi(**ROUNDS), info)


def test_every_hook_goes_through_the_list_in_order_and_the_end_in_reverse() -> None:
    notes: list[str] = []
    run = a_run()
    both = Integrations([Noting("first", notes), Noting("second", notes)])
    for hook in HOOKS:
        notes.clear()
        getattr(both, hook)(run, *([None] if hook == "on_decision" else []))
        names = ["second", "first"] if hook == "on_end" else ["first", "second"]
        assert notes == [f"{name}.{hook}" for name in names]


def test_if_one_cannot_start_those_before_it_are_ended_and_those_after_it_never_start() -> None:
    notes: list[str] = []
    members = [Noting("first", notes), Noting("second", notes, fails_in="on_start"), Noting("third", notes)]
    together = Integrations(members)
    with pytest.raises(LorankError, match="second cannot"):
        together.on_start(a_run())
    assert notes == ["first.on_start", "second.on_start", "first.on_end"]
    together.on_end(a_run())
    assert len(notes) == 3


def test_if_one_cannot_end_the_others_still_do() -> None:
    notes: list[str] = []
    run = a_run()
    together = Integrations([Noting("first", notes), Noting("second", notes, fails_in="on_end")])
    together.on_start(run)
    with pytest.raises(LorankError, match="second cannot"):
        together.on_end(run)
    assert notes[-2:] == ["second.on_end", "first.on_end"]
