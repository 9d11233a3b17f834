"""A rank state that is damaged, or of another base model, is refused, and nothing has changed."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import lorank
from lorank.errors import ResumeError
from lorank.lora import find_layers
from lorank.training.checkpoint.base_fingerprint import base_fingerprint
from lorank.training.checkpoint.state_schema import SEAL, check_seal, sealed
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


@pytest.fixture(scope="module")
def checkpoint() -> dict[str, Any]:
    return trained("alora", 4)


@pytest.fixture
def saved(checkpoint: dict[str, Any]) -> dict[str, Any]:
    return copy.deepcopy(checkpoint)


def refused(saved: dict[str, Any], message: str, base: nn.Module | None = None) -> None:
    _, optimizer, ranks = begin(base)
    before = {name: layer.A.clone() for name, layer in ranks.layers.items()}
    with pytest.raises(ResumeError, match=message):
        optimizer.load_state_dict(saved)
    assert ranks.step == 0
    assert all(torch.equal(layer.A, before[name]) for name, layer in ranks.layers.items())


DAMAGES = {
    "a module lacks": lambda state: state["ranks"].popitem(),
    "ranks beyond all memory": lambda state: state["ranks"].update(dict.fromkeys(state["ranks"], 10**12)),
    "a rank that is no number": lambda state: state["ranks"].update(dict.fromkeys(state["ranks"], True)),
    "steps below none": lambda state: state.update(step=-1),
    "a field lacks": lambda state: state.pop("state"),
    "a field too many": lambda state: state.update(more=1),
    "gates without B": lambda state: state.update(gated={"gates": torch.ones(3)}),
    "heads without ranks": lambda state: state.update(heads={"x": {"kind": "rows"}}),
    "a number for a tensor": lambda state: state.update(state={"a": 1.0}),
}


@pytest.mark.parametrize("forged", [False, True], ids=["damaged", "forged"])
@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_state_is_refused(saved: dict[str, Any], damage: Any, forged: bool) -> None:
    state = saved["param_groups"][0]["lorank"]
    damage(state)
    if forged:
        saved["param_groups"][0]["lorank"] = sealed({key: value for key, value in state.items() if key != SEAL})
    refused(saved, "the saved rank state" if forged else "SHA-256 differs.*Resume from another checkpoint")


@pytest.mark.parametrize("odd", [None, 3, "state", [], object()])
def test_something_else_in_its_place_is_refused(saved: dict[str, Any], odd: Any) -> None:
    if odd is not None:  # None: there is no state
        saved["param_groups"][0]["lorank"] = odd
        refused(saved, "the saved rank state is a")
    saved["param_groups"][0]["lorank"] = {"version": 3, "seed": odd, SEAL: odd}
    refused(saved, "SHA-256")


@pytest.mark.parametrize("method", METHODS)
def test_one_bit_anywhere_is_noticed(method: str) -> None:
    """And what every method writes can be sealed, and has the form that is checked."""
    state = trained(method, 4)["param_groups"][0]["lorank"]
    check_seal(state)
    assert state["state"] or method in {"static", "alora", "alora-retry", "alora-first-order"}
    tensors = {**state["state"], **state["gated"].get("B", {})}
    if "gates" in state["gated"]:
        tensors["gates"] = state["gated"]["gates"]
    for tensor in tensors.values():
        if not tensor.numel():
            continue
        bits = tensor.reshape(-1).view(torch.uint8)  # of the tensor itself: it is contiguous
        bits[0] ^= 1
        with pytest.raises(ResumeError, match="SHA-256"):
            check_seal(state)
        bits[0] ^= 1
    check_seal(state)


def test_another_base_model_of_the_same_shapes(saved: dict[str, Any]) -> None:
    base = tiny_llama()
    with torch.no_grad():
        base.model.layers[1].mlp.up_proj.weight.mul_(1.05)
    refused(saved, r"another base model: the frozen weight of model\.layers\.1\.mlp\.up_proj", base)


def test_the_same_base_model_in_another_float_type(saved: dict[str, Any]) -> None:
    _, optimizer, ranks = begin(tiny_llama().bfloat16())
    optimizer.load_state_dict(saved)
    assert ranks.step == 4


def test_weights_that_are_trained_are_not_compared() -> None:
    model = adapted(tiny_llama(), target_modules=TARGETS)
    layers = find_layers(model)
    every = base_fingerprint(layers)
    assert set(every) == set(layers), "six modules: each is looked at"
    assert all(len(values) == 16 for values in every.values())
    first = next(iter(layers))
    layers[first].module.get_base_layer().weight.requires_grad_()
    assert set(base_fingerprint(layers)) == set(layers) - {first}
