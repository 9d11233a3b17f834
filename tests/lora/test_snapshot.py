"""Whatever happens to layers at the start of a run, a snapshot brings them back to the last bit."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import nn

import lorank
from lorank.errors import LorankError
from lorank.lora import LayersSnapshot, find_layers, head_groups, resize_, split_into_heads_
from lorank.lora.resize_plan import LayerPlan
from tests.models import adapted, tiny_llama, token_batch


def trained(**lora: Any) -> tuple[PeftModel, torch.optim.Optimizer]:
    """After a step, so that the optimiser has a state."""
    model = adapted(tiny_llama(), random_B=False, **lora).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model(**token_batch(seed=1)).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return model, optimizer


def everything(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    layers = find_layers(model)
    config = layers.config
    return copy.deepcopy(
        {
            "weights": dict(model.state_dict()),
            "moments": [list(optimizer.state[w].items()) for x in layers.values() for w in (x.A, x.B)],
            "config": [config.r, config.lora_alpha, config.rank_pattern, config.alpha_pattern, config.target_modules],
            "fields": [
                [getattr(x.module, field)["default"] for field in ("r", "lora_alpha", "scaling")]
                for x in layers.values()
            ],
            "widths": [str(x.module.lora_A) + str(x.module.lora_B) for x in layers.values()],
        }
    )


def same(first: Any, second: Any) -> bool:
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(same, first, second))
    return bool(first == second)


@pytest.mark.parametrize("lora", [{}, {"use_dora": True}, {"use_rslora": True}], ids=["lora", "dora", "rslora"])
def test_after_a_resize_with_gates(lora: dict[str, Any]) -> None:
    model, optimizer = trained(**lora)
    layers, before = find_layers(model), everything(model, optimizer)
    snapshot = LayersSnapshot(layers, optimizer)
    resize_(layers, {name: LayerPlan((1,), 1 + i % 2) for i, name in enumerate(layers)}, optimizer)
    layers.learn_gates()
    with torch.no_grad():
        for layer in layers.values():
            layer.B.mul_(3)
    assert not same(before, everything(model, optimizer))
    snapshot.restore_()
    assert same(before, everything(model, optimizer))
    assert layers.gates is None
    assert all(layer.gate is None for layer in layers.values())
    model(**token_batch(seed=2)).loss.backward()
    optimizer.step()


def test_after_layers_were_split_into_heads() -> None:
    model = adapted(tiny_llama(), random_B=False).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    layers = find_layers(model)
    before = copy.deepcopy(dict(model.state_dict()))
    snapshot = LayersSnapshot(layers, optimizer)
    split_into_heads_(layers, head_groups(layers), optimizer)
    assert any(layer.groups is not None for layer in layers.values())
    snapshot.restore_()
    assert all(layer.groups is None for layer in layers.values())
    assert same(before, dict(model.state_dict()))
    model(**token_batch(seed=2)).loss.backward()
    optimizer.step()


def test_a_run_that_is_refused_after_ranks_have_moved_leaves_them_as_they_were() -> None:
    model, optimizer = trained()
    before, config = everything(model, optimizer), model.peft_config["default"]
    allocator = lorank.ALoRASensi(per_round=10_000, budget=1)  # the budget is met first, then the round does not fit
    with pytest.raises(LorankError, match="per_round"):
        lorank.attach(model, optimizer, allocator, total_steps=10)
    assert same(before, everything(model, optimizer))
    assert model.peft_config["default"] is config is model.base_model.peft_config["default"]
