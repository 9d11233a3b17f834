"""Several real processes train together (gloo): what they have stays equal, and is what one process would have."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lorank.training.agreement import digest
from tests.training.processes_run import STEPS, Case, Seen, launch, run

# Every form of DistributedDataParallel with another method; all with accumulation and gradient checkpointing.
TRAINED = {
    "alora": Case("alora"),
    "adalora": Case("adalora", options={"gradient_as_bucket_view": True}),
    "sora": Case("sora", options={"find_unused_parameters": True}),
    "ard": Case("ard", options={"static_graph": True}, accumulate=1),
    "ard per head": Case("ard-heads", attach_to="outer"),
    "alora-dnas": Case("alora-dnas"),
}
REFUSED = {
    "without DDP": (Case("alora", wrap="none"), "adapter after step 2"),
    "DDP keeps its old reducer": (Case("alora", changes={"old_reducer": True}), "adapter after step 4"),
    "another batch": (Case("alora", changes={"uneven": 1}), "validation batch: input_ids in process 1"),
    "another seed": (Case("alora", changes={"seed": 1}), "process 0 has 'seed: 7', process 1 has 'seed: 8'"),
}
RESUMED = {"whole": Case("alora", dropout=0.1), "half": Case("alora", stop=7), "rest": Case("alora", resume=True)}


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Seen]]:
    cases = {**TRAINED, **{name: case for name, (case, _) in REFUSED.items()}, **RESUMED}
    together = launch(tmp_path_factory.mktemp("processes"), list(cases.values()), count=2)
    return dict(zip(cases, together, strict=True))


@pytest.mark.parametrize("name", TRAINED)
def test_two_processes_have_the_same_and_what_one_would_have(
    name: str, seen: dict[str, list[Seen]], tmp_path: Path
) -> None:
    first, second = seen[name]
    assert not first.error
    assert len(first.hashes) == STEPS
    assert first.hashes == second.hashes
    assert first.allocations >= 4
    assert len({tuple(ranks) for ranks in first.ranks}) > 1
    alone = run(TRAINED[name], tmp_path, index=0, count=1)
    assert first.ranks == alone.ranks
    assert first.losses == pytest.approx(alone.losses, rel=1e-5)
    assert first.losses[-1] < first.losses[0]
    for ours, theirs in zip(first.scores, alone.scores, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("name", REFUSED)
def test_processes_that_differ_stop_and_say_in_what(name: str, seen: dict[str, list[Seen]]) -> None:
    messages = [one.error for one in seen[name]]
    assert messages[0] == messages[1]
    assert messages[0].startswith("DisagreementError: the processes do not have the same")
    assert REFUSED[name][1] in messages[0]


def test_a_run_of_two_processes_goes_on_in_two_and_in_one(seen: dict[str, list[Seen]], tmp_path: Path) -> None:
    """From weights and optimiser that process 0 saved. In one process sums are rounded otherwise."""
    (half, _), (rest, other), whole = seen["half"], seen["rest"], seen["alora"][0]
    assert half.hashes + rest.hashes == whole.hashes
    assert half.losses + rest.losses == whole.losses
    assert rest.hashes == other.hashes


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
