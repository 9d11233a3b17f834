"""DeepSpeed's ZeRO in two processes (gloo): the ranks and losses of one process, resumed exactly, saved as PEFT."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

from lorank.lora import find_layers
from tests.models import adapted, tiny_llama
from tests.once import once
from tests.one_more import DEEPSPEED
from tests.training.parallel.processes_run import STEPS, Case, Seen, launch, launched, run
from tests.training.parallel.processes_table import apart, case_of, flat

pytest.importorskip("deepspeed", reason="DeepSpeed is not installed: pip install 'lorank[deepspeed]'")

HALF = STEPS // 2
TRAINED = {
    name: case_of(method, wrap)
    for name, method, wrap in (
        ("ZeRO-2, alora", "alora", "zero2"),
        ("ZeRO-3, alora", "alora", "zero3"),
        ("ZeRO-2, adalora", "adalora", "zero2"),
        ("ZeRO-3, sora", "sora", "zero3"),
        ("ZeRO-1, ard", "ard", "zero1"),
        ("ZeRO-2, balanced", "balanced", "zero2"),
        ("ZeRO-3, balanced", "balanced-default", "zero3"),
    )
}
OTHERS = {
    part: replace(case_of("alora", "zero3"), file="zero3.checkpoint", stop=stop, resume=part == "rest")
    for part, stop in (("half", HALF), ("rest", STEPS))
}
REFUSED = {
    "ranks per head": (case_of("ard-heads", "zero2"), "heads='module'"),
    "backward passes under ZeRO-3": (case_of("alora-dnas", "zero3"), "use ZeRO-2"),
    "a gradient start under ZeRO-3": (case_of("balanced", "zero3"), "BalancedLoRA with init='default'"),
    "estimates under ZeRO-3": (case_of("alora-first-order", "zero3"), "scores='exact'"),
    "no room": (replace(case_of("alora", "zero2"), changes={"room": None}), "lorank.reserve_(model, max_rank=…)"),
}


CASES = {**TRAINED, **OTHERS, **{name: case for name, (case, _) in REFUSED.items()}}


@pytest.fixture(scope="module")
def cases(request: pytest.FixtureRequest) -> dict[str, Case]:
    """The cases whose tests run."""
    wanted = {item.callspec.params.get("name") for item in request.session.items if hasattr(item, "callspec")}
    return {name: case for name, case in CASES.items() if name not in DEEPSPEED or name in wanted}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, cases: dict[str, Case]) -> Path:
    """Where all cases have run in two processes."""
    return once(tmp_path_factory, "deepspeed", lambda folder: launch(folder, list(cases.values()), count=2))


@pytest.fixture(scope="module")
def seen(folder: Path, cases: dict[str, Case]) -> dict[str, list[Seen]]:
    """What each of the two saw."""
    return dict(zip(cases, launched(folder, count=2), strict=True))


@pytest.fixture(scope="module")
def alone(folder: Path) -> Callable[[str], Seen]:
    """What one process sees, without DeepSpeed, in float32 too."""
    return cache(lambda name: run(replace(TRAINED[name], wrap="none"), folder, index=0, count=1))


@pytest.mark.parametrize("name", TRAINED)
def test_ranks_and_losses_are_those_of_one_process(
    name: str, seen: dict[str, list[Seen]], alone: Callable[[str], Seen]
) -> None:
    first, second = seen[name]
    assert not first.error
    assert len(first.hashes) == STEPS
    assert first.hashes == second.hashes
    assert first.allocations >= 4
    assert first.ranks == alone(name).ranks
    assert len({tuple(ranks) for ranks in first.ranks}) > 1
    assert apart(first.losses, alone(name).losses) < 1e-6
    assert apart(flat(first.scores), flat(alone(name).scores)) < 1e-2  # differences of losses in float32


def test_a_run_goes_on_bitwise(seen: dict[str, list[Seen]]) -> None:
    half, rest, whole = seen["half"][0], seen["rest"][0], seen["ZeRO-3, alora"][0]
    assert not rest.error
    assert half.losses + rest.losses == whole.losses
    assert half.hashes + rest.hashes == whole.hashes


def test_what_is_saved_is_plain_peft_of_the_ranks_at_the_end(seen: dict[str, list[Seen]], folder: Path) -> None:
    from peft import PeftModel

    first = seen["rest"][0]
    model = PeftModel.from_pretrained(tiny_llama(1), folder / "zero3.checkpoint.adapter")
    layers = find_layers(model)
    there = dict(zip(find_layers(adapted(tiny_llama(1))), first.ranks[-1], strict=True))
    assert layers.ranks == {name: rank for name, rank in there.items() if rank}
    assert all(layer.B.any() for layer in layers.values())


@pytest.mark.parametrize("name", REFUSED)
def test_unsupported_runs_are_refused(name: str, seen: dict[str, list[Seen]]) -> None:
    for one in seen[name]:
        assert REFUSED[name][1] in one.error
        assert not one.losses
