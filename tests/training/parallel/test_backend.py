"""The backend is chosen by what trains: one process, several with DDP, a sharded base, or DeepSpeed."""

from __future__ import annotations

import pytest
from accelerate import Accelerator
from torch import nn

import lorank
from lorank.errors import LorankError
from lorank.lora import find_layers
from lorank.training.parallel import find_backend, fsdp, inner_model
from lorank.training.parallel.backend import Backend
from lorank.training.parallel.ddp import DdpBackend
from lorank.training.parallel.fsdp import FsdpBackend
from lorank.training.parallel.process_group import ProcessGroup
from tests.models import adapted, tiny_llama, token_batch
from tests.training.loops import QUICK, adamw


@pytest.mark.parametrize(
    ("processes", "sharded", "kind"), [(1, False, Backend), (2, False, DdpBackend), (2, True, FsdpBackend)]
)
def test_the_backend_of_a_run(processes: int, sharded: bool, kind: type, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ProcessGroup, "of", lambda _: ProcessGroup(processes))
    monkeypatch.setattr(fsdp, "is_sharded", lambda _: sharded)
    model = adapted(tiny_llama())
    optimizer = adamw(model)
    backend = find_backend(find_layers(model), model, optimizer)
    assert type(backend) is kind
    assert backend.optimizer is optimizer
    assert backend.lockstep == sharded  # a sharded model's forward pass needs all processes at once


def test_the_optimiser_is_the_one_inside_accelerates_wrapper() -> None:
    model = adapted(tiny_llama())
    optimizer = adamw(model)
    wrapped = Accelerator(cpu=True).prepare(optimizer)
    assert find_backend(find_layers(model), model, wrapped).optimizer is optimizer


def test_a_model_without_a_wrapper_is_its_own_inner_model() -> None:
    model = nn.Linear(2, 2)
    assert inner_model(model) is model


def test_the_plain_backend_has_the_whole_adapter_at_any_time() -> None:
    model = adapted(tiny_llama())
    weights = [parameter.clone() for parameter in model.parameters()]
    with find_backend(find_layers(model), model, adamw(model)).gathered():
        assert all(bool((a == b).all()) for a, b in zip(weights, model.parameters(), strict=True))


def test_deepspeed_without_reserved_ranks_is_refused() -> None:
    model = adapted(tiny_llama())
    optimizer = adamw(model)
    optimizer.__class__ = type("DeepSpeedZeroOptimizer", (type(optimizer),), {"__module__": "deepspeed.runtime.zero"})
    with pytest.raises(LorankError, match=r"call lorank.reserve_\(model"):
        lorank.attach(model, optimizer, QUICK, validation_batch=token_batch(), total_steps=10)
