"""Several real processes train together (gloo): what they have stays equal, and is what one process would have."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

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
