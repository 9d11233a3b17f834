"""Several real processes train together (gloo): what they have stays equal, and is what one process would have."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import lorank
from lorank.errors import LorankError
from tests.models import adapted, tiny_llama, token_batch
from tests.training.loops import adamw
from tests.training.parallel.processes_cases import (
    DDP,
    check_equal_to_one_process,
    check_resumed_bitwise,
    check_resumed_in_one,
    check_resumed_in_two,
)
from tests.training.parallel.processes_run import Case, Seen, launch, run

FOUR = [Case("alora"), Case("ard-heads", "fsdp2")]


@pytest.mark.parametrize("name", DDP)
def test_two_processes_have_the_same_and_what_one_would_have(
    name: str, seen: dict[str, list[Seen]], alone: Callable[..., Seen]
) -> None:
    case = DDP[name]
    check_equal_to_one_process(seen[name], alone(case.method, case.accumulate, case.dora))


def test_so_do_four_processes(folder: Path, alone: Callable[..., Seen]) -> None:
    for case, together in zip(FOUR, launch(folder / "four", FOUR, count=4), strict=True):
        assert len(together) == 4
        check_equal_to_one_process(together, alone(case.method))


def test_a_run_of_two_processes_goes_on_in_two_bitwise(seen: dict[str, list[Seen]]) -> None:
    check_resumed_bitwise(seen["half"][0], seen["rest"], seen["alora"][0])
    check_resumed_bitwise(seen["half, balanced"][0], seen["rest, balanced"], seen["balanced"][0])


def test_a_run_of_one_process_goes_on_in_two(seen: dict[str, list[Seen]], alone: Callable[..., Seen]) -> None:
    check_resumed_in_two(seen["rest of one process's"], alone("alora"))


@pytest.mark.usefixtures("seen")
def test_a_run_of_two_processes_goes_on_in_one(folder: Path, alone: Callable[..., Seen]) -> None:
    rest = run(Case("alora", "none", resume=True, file="ddp.pt"), folder, index=0, count=1)
    check_resumed_in_one(rest, alone("alora"))


def test_with_dropout_processes_draw_other_masks_and_stay_together(seen: dict[str, list[Seen]]) -> None:
    first, second = seen["dropout"]
    assert not first.error
    assert first.hashes == second.hashes
    assert first.losses != seen["alora"][0].losses


@pytest.fixture
def process_group() -> Iterator[None]:
    """A group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("process_group")
def test_after_a_run_that_could_not_begin_gradients_are_still_averaged() -> None:
    """The layers were resized and restored in between. Without a new reducer, processes would silently diverge."""
    model = adapted(tiny_llama(), random_B=False)
    ddp = DistributedDataParallel(model)
    averaged: list[torch.Size] = []

    def hook(_, bucket):  # DDP refuses annotations that are text
        averaged.extend(gradient.shape for gradient in bucket.gradients())
        future: torch.futures.Future[torch.Tensor] = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    ddp.register_comm_hook(None, hook)
    optimizer = adamw(model)
    with pytest.raises(LorankError, match="per_round"):
        lorank.attach(ddp, optimizer, lorank.ALoRASensi(budget=6, per_round=10_000), total_steps=4)
    for seed in range(2):
        averaged.clear()
        ddp(**token_batch(seed=seed)).loss.backward()
        assert len(averaged) == 28
        optimizer.step()
        optimizer.zero_grad()
