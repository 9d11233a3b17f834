"""Several real processes train together (gloo): what they have stays equal, and is what one process would have."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch

from lorank.training.parallel.consistency import digest
from tests.once import once
from tests.training.parallel.processes_run import STEPS, Case, Seen, launch, launched, run

# Every form of DistributedDataParallel with another method; all with accumulation and gradient checkpointing.
TRAINED = {
    "alora": Case("alora"),
    "adalora": Case("adalora", options={"gradient_as_bucket_view": True}),
    "sora": Case("sora", options={"find_unused_parameters": True}),
    "ard": Case("ard", options={"static_graph": True}, accumulate=1),
    "ard per head": Case("ard-heads", attach_to="outer"),
    "alora-dnas": Case("alora-dnas"),
    "alora-first-order": Case("alora-first-order"),
    "DoRA": Case("alora", dora=True),
    "alora, FSDP2": Case("alora", "fsdp2"),
    "adalora, FSDP2": Case("adalora", "fsdp2", attach_to="outer"),
    "alora-first-order, FSDP2": Case("alora-first-order", "fsdp2"),
    "DoRA, FSDP2": Case("alora", "fsdp2", dora=True),
    "ard per head, FSDP2": Case("ard-heads", "fsdp2"),
}
FOUR = [Case("alora"), Case("ard-heads", "fsdp2")]
REFUSED = {
    "without DDP": (Case("alora", wrap="none"), "adapter after step 2"),
    "DDP keeps its old reducer": (Case("alora", changes={"old_reducer": True}), "adapter after step 4"),
    "another batch": (Case("alora", changes={"uneven": 1}), "validation batch: input_ids differs between process 1"),
    "another seed": (Case("alora", changes={"seed": 1}), "process 0 has 'seed: 7', process 1 has 'seed: 8'"),
}
HALF = STEPS // 2
RESUMED = {
    "half": Case("alora", stop=HALF),
    "rest": Case("alora", resume=True),
    "half, FSDP2": Case("alora", "fsdp2", stop=HALF, file="fsdp2.pt"),
    "rest, FSDP2": Case("alora", "fsdp2", resume=True, file="fsdp2.pt"),
    "rest of one process's": Case("alora", resume=True, file="alone.pt"),
    "rest of one process's, FSDP2": Case("alora", "fsdp2", resume=True, file="alone.pt"),
}
OTHERS = {"dropout": Case("alora", dropout=0.1)}


CASES = {**TRAINED, **{name: case for name, (case, _) in REFUSED.items()}, **RESUMED, **OTHERS}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where all cases have run in two processes."""

    def make(folder: Path) -> None:
        run(Case("alora", "none", stop=HALF, file="alone.pt"), folder, index=0, count=1)
        launch(folder, list(CASES.values()), count=2)

    return once(tmp_path_factory, "processes", make)


@pytest.fixture(scope="module")
def seen(folder: Path) -> dict[str, list[Seen]]:
    """What each of the two saw."""
    return dict(zip(CASES, launched(folder, count=2), strict=True))


@pytest.fixture(scope="module")
def alone(folder: Path) -> Callable[..., Seen]:
    """What one process sees, with the same global batch."""

    @cache
    def seen_alone(method: str, accumulate: int = 2, dora: bool = False) -> Seen:
        return run(Case(method, "none", accumulate=accumulate, dora=dora), folder, index=0, count=1)

    return seen_alone


def check(together: list[Seen], alone: Seen) -> None:
    first = together[0]
    assert not first.error
    assert len(first.hashes) == STEPS
    assert all(one.hashes == first.hashes for one in together)
    assert first.allocations >= 4
    assert len({tuple(ranks) for ranks in first.ranks}) > 1
    assert first.ranks == alone.ranks
    assert first.losses == pytest.approx(alone.losses, rel=1e-5)
    assert first.losses[-1] < first.losses[0]
    for ours, theirs in zip(first.scores, alone.scores, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("name", TRAINED)
def test_two_processes_have_the_same_and_what_one_would_have(
    name: str, seen: dict[str, list[Seen]], alone: Callable[..., Seen]
) -> None:
    case = TRAINED[name]
    check(seen[name], alone(case.method, case.accumulate, case.dora))


def test_so_do_four_processes(folder: Path, alone: Callable[..., Seen]) -> None:
    for case, together in zip(FOUR, launch(folder / "four", FOUR, count=4), strict=True):
        assert len(together) == 4
        check(together, alone(case.method))


@pytest.mark.parametrize("name", REFUSED)
def test_processes_that_differ_stop_and_name_the_difference(name: str, seen: dict[str, list[Seen]]) -> None:
    messages = [one.error for one in seen[name]]
    assert messages[0] == messages[1]
    assert messages[0].startswith("DisagreementError: the processes do not have the same")
    assert REFUSED[name][1] in messages[0]


def test_with_dropout_processes_draw_other_masks_and_stay_together(seen: dict[str, list[Seen]]) -> None:
    first, second = seen["dropout"]
    assert not first.error
    assert first.hashes == second.hashes
    assert first.losses != seen["alora"][0].losses


@pytest.mark.parametrize("suffix", ["", ", FSDP2"])
def test_a_run_of_two_processes_goes_on_in_two_bitwise(suffix: str, seen: dict[str, list[Seen]]) -> None:
    half, whole = seen[f"half{suffix}"][0], seen[f"alora{suffix}"][0]
    rest, other = seen[f"rest{suffix}"]
    assert half.hashes + rest.hashes == whole.hashes
    assert half.losses + rest.losses == whole.losses
    assert rest.hashes == other.hashes


@pytest.mark.parametrize("name", ["rest of one process's", "rest of one process's, FSDP2"])
def test_a_run_of_one_process_goes_on_in_two(
    name: str, seen: dict[str, list[Seen]], alone: Callable[..., Seen]
) -> None:
    """Sums are rounded otherwise, and nothing else differs where the global batches are the same."""
    first, second = seen[name]
    assert not first.error
    assert first.hashes == second.hashes
    assert first.ranks == alone("alora").ranks[HALF:]
    assert first.losses == pytest.approx(alone("alora").losses[HALF:], rel=1e-5)


@pytest.mark.parametrize("file", ["ddp.pt", "fsdp2.pt"])
def test_a_run_of_two_processes_goes_on_in_one(
    file: str, seen: dict[str, list[Seen]], folder: Path, alone: Callable[..., Seen]
) -> None:
    rest = run(Case("alora", "none", resume=True, file=file), folder, index=0, count=1)
    assert rest.ranks == alone("alora").ranks[HALF:]
    assert rest.losses == pytest.approx(alone("alora").losses[HALF:], rel=1e-5)


class TestAgreement:
    def test_a_hash_sees_one_bit_and_one_place(self) -> None:
        values = torch.randn(1000, generator=torch.Generator().manual_seed(0))
        other = values.clone()
        other[17] = torch.nextafter(other[17], torch.tensor(9.0))
        swapped = values.clone()
        swapped[[3, 4]] = values[[4, 3]]
        kinds = [values, other, swapped, values[:-1], -values, torch.zeros(3), torch.zeros(4), torch.tensor([])]
        assert len({int(digest(kind)) for kind in kinds}) == len(kinds)
        assert digest(values) == digest(values.clone().reshape(10, 100))

    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int64, torch.uint8, torch.bool])
    def test_a_hash_of_every_type(self, dtype: torch.dtype) -> None:
        assert digest(torch.tensor([0, 1], dtype=dtype)) != digest(torch.tensor([1, 0], dtype=dtype))
