"""A rank state that is damaged or forged is refused, and nothing has changed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lorank.errors import ResumeError
from lorank.training.checkpoint.rank_state import VERSION
from lorank.training.checkpoint.state_schema import SEAL, check_seal, sealed
from tests.methods import METHODS
from tests.training.checkpoint.saved_runs import refused, trained

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
    saved["param_groups"][0]["lorank"] = {"version": VERSION, "seed": odd, SEAL: odd}
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
