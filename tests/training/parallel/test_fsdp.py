"""A base model sharded by FSDP2: processes stay equal, have what one process would have, and average gradients."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lorank.errors import LorankError
from lorank.training.parallel.fsdp import average_, is_sharded, shard_base_
from tests.models import adapted, tiny_llama
from tests.training.parallel.processes_cases import (
    FSDP,
    check_equal_to_one_process,
    check_resumed_bitwise,
    check_resumed_in_one,
    check_resumed_in_two,
)
from tests.training.parallel.processes_run import Case, Seen, run
from tests.training.parallel.threads import together


@pytest.mark.parametrize("name", FSDP)
def test_two_processes_have_the_same_and_what_one_would_have(
    name: str, seen: dict[str, list[Seen]], alone: Callable[..., Seen]
) -> None:
    case = FSDP[name]
    check_equal_to_one_process(seen[name], alone(case.method, case.accumulate, case.dora))


def test_a_run_of_two_processes_goes_on_in_two_bitwise(seen: dict[str, list[Seen]]) -> None:
    check_resumed_bitwise(seen["half, FSDP2"][0], seen["rest, FSDP2"], seen["alora, FSDP2"][0])


def test_a_run_of_one_process_goes_on_in_two(seen: dict[str, list[Seen]], alone: Callable[..., Seen]) -> None:
    check_resumed_in_two(seen["rest of one process's, FSDP2"], alone("alora"))


@pytest.mark.usefixtures("seen")
def test_a_run_of_two_processes_goes_on_in_one(folder: Path, alone: Callable[..., Seen]) -> None:
    rest = run(Case("alora", "none", resume=True, file="fsdp2.pt"), folder, index=0, count=1)
    check_resumed_in_one(rest, alone("alora"))


def test_gradients_are_averaged_and_a_missing_one_counts_as_zero() -> None:
    def work(group: Any) -> list[list[float] | None]:
        everywhere, somewhere, nowhere = (nn.Parameter(torch.zeros(2)) for _ in range(3))
        everywhere.grad = torch.tensor([1.0, 2.0]) * (1 + group.index)
        if group.index == 1:
            somewhere.grad = torch.tensor([4.0, 8.0])
        average_(group, [everywhere, somewhere, nowhere])
        return [p.grad if p.grad is None else p.grad.tolist() for p in (everywhere, somewhere, nowhere)]

    assert together(work) == [[[1.5, 3.0], [2.0, 4.0], None]] * 2


def test_without_other_processes_nothing_is_sharded() -> None:
    model = adapted(tiny_llama())
    assert shard_base_(model) is model
    assert not is_sharded(model)


def test_a_model_without_an_adapter_is_refused() -> None:
    model = tiny_llama().requires_grad_(False)
    with pytest.raises(LorankError, match="no parameter requires a gradient"):
        shard_base_(model)
