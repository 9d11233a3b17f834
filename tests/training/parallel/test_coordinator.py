"""Processes that differ stop, all with the same message; gates are averaged over them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from lorank.errors import DisagreementError
from lorank.lora import LayerPlan, find_layers
from lorank.training.parallel.coordinator import ProcessCoordinator
from tests.models import adapted, tiny_llama
from tests.training.parallel.processes_cases import REFUSED
from tests.training.parallel.processes_run import Seen
from tests.training.parallel.threads import together


@pytest.mark.parametrize("name", REFUSED)
def test_processes_that_differ_stop_and_name_the_difference(name: str, seen: dict[str, list[Seen]]) -> None:
    messages = [one.error for one in seen[name]]
    assert messages[0] == messages[1]
    assert messages[0].startswith("DisagreementError: the processes do not have the same")
    assert REFUSED[name][1] in messages[0]


def test_gradients_of_gates_are_averaged() -> None:
    def work(group: Any) -> list[float]:
        layers = find_layers(adapted(tiny_llama(1), target_modules=["q_proj"]))
        layers.learn_gates().grad.fill_(1.0 + 2 * group.index)
        ProcessCoordinator(group, lockstep=False).before_step(SimpleNamespace(layers=layers))
        return layers.gates.grad.tolist()

    assert together(work) == [[2.0] * 4] * 2


def test_another_plan_is_refused_with_the_step_and_the_module() -> None:
    def work(group: Any) -> None:
        allocation = SimpleNamespace(plan={"q_proj": LayerPlan((0, 1 + group.index))})
        ProcessCoordinator(group, lockstep=False).on_decision(SimpleNamespace(step=7), allocation)

    for error in together(work):
        assert isinstance(error, DisagreementError)
        assert "do not have the same plan after step 7: process 0 has 'q_proj: LayerPlan(keep=(0, 1)" in str(error)


def test_no_allocation_in_one_process_is_refused() -> None:
    def work(group: Any) -> None:
        allocation = SimpleNamespace(plan={}) if group.index else None
        ProcessCoordinator(group, lockstep=False).on_decision(SimpleNamespace(step=7), allocation)

    for error in together(work):
        assert "process 0 has 'allocation: False', process 1 has 'allocation: True'" in str(error)
