"""The cases that run in two processes, all of them in one start of the processes, and what is asked of each."""

from __future__ import annotations

import pytest

from tests.training.parallel.processes_run import STEPS, Case, Seen

# Every form of DistributedDataParallel with another method; all with accumulation and gradient checkpointing.
DDP = {
    "alora": Case("alora"),
    "adalora": Case("adalora", options={"gradient_as_bucket_view": True}),
    "sora": Case("sora", options={"find_unused_parameters": True}),
    "ard": Case("ard", options={"static_graph": True}, accumulate=1),
    "ard per head": Case("ard-heads", attach_to="outer"),
    "alora-dnas": Case("alora-dnas"),
    "alora-first-order": Case("alora-first-order"),
    "alora-options": Case("alora-options"),
    "DoRA": Case("alora", dora=True),
    "balanced": Case("balanced"),
}
FSDP = {
    "alora, FSDP2": Case("alora", "fsdp2"),
    "adalora, FSDP2": Case("adalora", "fsdp2", attach_to="outer"),
    "alora-first-order, FSDP2": Case("alora-first-order", "fsdp2"),
    "DoRA, FSDP2": Case("alora", "fsdp2", dora=True),
    "ard per head, FSDP2": Case("ard-heads", "fsdp2"),
    "balanced, FSDP2": Case("balanced", "fsdp2"),
}
REFUSED = {
    "without DDP": (Case("alora", wrap="none"), "adapter after step 2"),
    "DDP keeps its old reducer": (Case("alora", changes={"old_reducer": True}), "adapter after step 4"),
    "another batch": (Case("alora", changes={"uneven": 1}), "validation batch: input_ids differs between process 1"),
    "another seed": (Case("alora", changes={"seed": 1}), "process 0 has 'seed: 7', process 1 has 'seed: 8'"),
}
HALF = STEPS // 2
IN_A_WINDOW = 9
"""A step between two cuts of BalancedLoRA, whose state then has sums of both processes."""
RESUMED = {
    "half": Case("alora", stop=HALF),
    "rest": Case("alora", resume=True),
    "half, FSDP2": Case("alora", "fsdp2", stop=HALF, file="fsdp2.pt"),
    "rest, FSDP2": Case("alora", "fsdp2", resume=True, file="fsdp2.pt"),
    "half, balanced": Case("balanced", stop=IN_A_WINDOW, file="balanced.pt"),
    "rest, balanced": Case("balanced", resume=True, file="balanced.pt"),
    "rest of one process's": Case("alora", resume=True, file="alone.pt"),
    "rest of one process's, FSDP2": Case("alora", "fsdp2", resume=True, file="alone.pt"),
}
OTHERS = {"dropout": Case("alora", dropout=0.1)}
CASES = {**DDP, **FSDP, **{name: case for name, (case, _) in REFUSED.items()}, **RESUMED, **OTHERS}


def check_equal_to_one_process(together: list[Seen], alone: Seen) -> None:
    """The processes have the same, and what one process has with the same global batch."""
    first = together[0]
    assert not first.error
    assert len(first.hashes) == STEPS
    assert all(one.hashes == first.hashes for one in together)
    assert first.allocations >= 4
    assert len({tuple(ranks) for ranks in first.ranks}) > 1
    assert first.ranks == alone.ranks
    assert first.losses == pytest.approx(alone.losses, rel=1e-5)
    assert min(first.losses[1:]) < first.losses[0]
    for ours, theirs in zip(first.scores, alone.scores, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-6)


def check_resumed_bitwise(half: Seen, rest: list[Seen], whole: Seen) -> None:
    """A run that two processes stopped and continued is the run that they did not stop."""
    assert half.hashes + rest[0].hashes == whole.hashes
    assert half.losses + rest[0].losses == whole.losses
    assert rest[0].hashes == rest[1].hashes


def check_resumed_in_two(rest: list[Seen], alone: Seen) -> None:
    """A run of one process goes on in two. Sums are rounded otherwise, and nothing else differs."""
    first, second = rest
    assert not first.error
    assert first.hashes == second.hashes
    check_resumed_in_one(first, alone)


def check_resumed_in_one(rest: Seen, alone: Seen) -> None:
    assert rest.ranks == alone.ranks[HALF:]
    assert rest.losses == pytest.approx(alone.losses[HALF:], rel=1e-5)
