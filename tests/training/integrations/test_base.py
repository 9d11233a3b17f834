"""A run notifies its integrations in order, starts all of them or none, and ends them in reverse."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import lorank
from lorank.allocators import ALoRA, ALoRASensi
from lorank.errors import LorankError
from lorank.lora import find_layers
from lorank.lora.variants.fused import FusedLora
from lorank.training.integrations.base import Integration, Integrations, StepSkipped
from lorank.training.integrations.no_allocation_warning import NoAllocationWarning
from lorank.training.run_state import RunState
from tests.models import adapted, tiny_llama, token_batch

HOOKS = (
    "on_start",
    "before_step",
    "before_read",
    "on_decision",
    "after_resize",
    "after_allocation",
    "after_step",
    "on_end",
)
ROUNDS: dict[str, Any] = {"k1": 2, "k2": 5, "rounds": 1, "unit": "steps", "per_round": 4}


class Noting(Integration):
    """Notes under its name which of its hooks run."""

    def __init__(self, name: str, notes: list[str], fails_in: str = "") -> None:
        for hook in HOOKS:
            setattr(self, hook, lambda *_, hook=hook: self._note(name, hook, notes, fails_in))

    @staticmethod
    def _note(name: str, hook: str, notes: list[str], fails_in: str) -> None:
        notes.append(f"{name}.{hook}")
        if hook == fails_in:
            raise LorankError(f"{name} cannot")


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


def test_the_hooks_run_in_the_order_that_the_protocol_names() -> None:
    """In a step in which ranks move, with everything that a real run does in between."""
    notes: list[str] = []
    model = adapted(tiny_llama(), random_B=False).train()
    optimizer = adamw(model)
    ranks = lorank.attach(model, optimizer, ALoRASensi(**ROUNDS), total_steps=10)
    ranks._integrations = Integrations([*ranks._integrations.members, Noting("it", notes)])
    for step in (1, 2):
        notes.clear()
        model(**token_batch(seed=step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert [note.removeprefix("it.") for note in notes] == list(HOOKS[1:-1])


def test_a_skipped_step_is_not_counted() -> None:
    class Skipping(Integration):
        def before_step(self, run: RunState) -> None:
            raise StepSkipped

    model = adapted(tiny_llama(), random_B=False).train()
    optimizer = adamw(model)
    ranks = lorank.attach(model, optimizer, ALoRASensi(**ROUNDS), total_steps=10)
    ranks._integrations = Integrations([Skipping(), *ranks._integrations.members])
    model(**token_batch(seed=1)).loss.backward()
    optimizer.step()
    assert ranks.step == 0
    assert not any(value.any() for value in ranks.state.values())


def hooks_of(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> list[int]:
    tables = [optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks]
    tables += [optimizer._optimizer_state_dict_post_hooks, optimizer._optimizer_load_state_dict_post_hooks]
    counts = [len(table) for table in tables]
    return counts + [
        sum(len(table(module)) for module in model.modules())
        for table in (lambda m: m._forward_pre_hooks, lambda m: m._load_state_dict_pre_hooks)
    ]


@pytest.mark.parametrize("fails", ["the settings", "an integration"])
def test_a_run_that_cannot_begin_leaves_no_hook_and_no_variant(fails: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted(tiny_llama(), random_B=False).train()
    optimizer = adamw(model)
    before, weights, ranks = hooks_of(model, optimizer), copy.deepcopy(model.state_dict()), find_layers(model).ranks
    allocator: Any = ALoRASensi(**{**ROUNDS, "per_round": 10_000})
    if fails == "an integration":  # the last one, when all others have started
        allocator = ALoRA(**ROUNDS)

        def failing(self: Any, run: RunState) -> None:
            raise LorankError("cannot")

        monkeypatch.setattr(NoAllocationWarning, "on_start", failing)
    with pytest.raises(LorankError):
        lorank.attach(model, optimizer, allocator, validation_batch=token_batch(seed=9), total_steps=10)
    assert hooks_of(model, optimizer) == before
    assert find_layers(model).ranks == ranks
    for name, value in model.state_dict().items():
        assert torch.equal(value, weights[name]), name
    for layer in find_layers(model).values():
        assert layer.gate is None
        assert not isinstance(layer.module.lora_variant.get(layer.adapter), FusedLora)
