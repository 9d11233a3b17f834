"""The rank state resumes a run bitwise, kept in the optimiser or apart, and is refused by any other run."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

import lorank
from lorank.allocators import Allocator
from lorank.errors import ResumeError
from lorank.training.checkpoint.state_schema import SEAL, sealed
from tests.models import adapted, tiny_llama, token_batch
from tests.training.loops import QUICK, adamw, run_loop


@pytest.mark.parametrize("stop", [3, 5, 6])
def test_resume_is_bitwise(tmp_path: Path, stop: int) -> None:
    straight, whole, _ = run_loop(range(10), None, None)
    first, _, saved = run_loop(range(10), None, stop)
    torch.save(saved, tmp_path / "checkpoint.pt")
    loaded = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    second, resumed, _ = run_loop(range(stop, 10), loaded, None)
    assert first + second == straight
    assert resumed.layers.ranks == whole.layers.ranks
    assert resumed.step == whole.step == 10
    for name, layer in whole.layers.items():
        assert torch.equal(layer.A, resumed.layers[name].A)
        assert torch.equal(layer.B, resumed.layers[name].B)


def test_the_state_can_be_kept_apart() -> None:
    _, ranks, _ = run_loop(range(10), None, 5)
    model = adapted(tiny_llama(), random_B=False)
    other = lorank.attach(model, adamw(model), QUICK, validation_batch=token_batch(seed=99), total_steps=10, seed=3)
    other.load_state_dict(ranks.state_dict())
    assert (other.step, other.layers.ranks) == (5, ranks.layers.ranks)


class TestRefusedResume:
    @pytest.fixture
    def saved(self) -> Any:
        return run_loop(range(10), None, 3)[2]["optimizer"]

    def resume(self, saved: Any, allocator: Allocator = QUICK, seed: int = 3, **lora: Any) -> None:
        model = adapted(tiny_llama(), **lora)
        optimizer = adamw(model)
        lorank.attach(model, optimizer, allocator, validation_batch=token_batch(), total_steps=10, seed=seed)
        optimizer.load_state_dict(saved)

    def test_another_method(self, saved: Any) -> None:
        with pytest.raises(ResumeError, match="method: saved 'ALoRA', now 'StaticLoRA'"):
            self.resume(saved, lorank.StaticLoRA())

    def test_other_settings(self, saved: Any) -> None:
        with pytest.raises(ResumeError, match="rounds: saved 3, now 4"):
            self.resume(saved, lorank.ALoRA(k1=2, k2=2, rounds=4, unit="steps", per_round=6))

    def test_a_setting_that_is_newer_than_the_checkpoint_has_its_default(self, saved: Any) -> None:
        state = saved["param_groups"][0]["lorank"]
        for newer in ("new_ranks", "second_moments", "per_parameter", "rotate"):
            del state["allocator"][newer]
        saved["param_groups"][0]["lorank"] = sealed({key: value for key, value in state.items() if key != SEAL})
        self.resume(saved)
        with pytest.raises(ResumeError, match="new_ranks: saved 'random', now 'gradient'"):
            self.resume(saved, dataclasses.replace(QUICK, new_ranks="gradient"))

    def test_another_seed(self, saved: Any) -> None:
        with pytest.raises(ResumeError, match="seed: saved 3, now 4"):
            self.resume(saved, seed=4)

    def test_another_budget(self, saved: Any) -> None:
        with pytest.raises(ResumeError, match=r"another budget: 56 ranks in 14 modules, here 28\."):
            self.resume(saved, r=2)

    def test_another_model(self, saved: Any) -> None:
        model = adapted(tiny_llama(intermediate_size=64))
        optimizer = adamw(model)
        lorank.attach(model, optimizer, QUICK, validation_batch=token_batch(), total_steps=10, seed=3)
        with pytest.raises(ResumeError, match="is of another model: its 14 adapted modules differ in name or shape"):
            optimizer.load_state_dict(saved)

    def test_another_version(self, saved: Any) -> None:
        saved["param_groups"][0]["lorank"]["version"] = 99
        with pytest.raises(ResumeError, match="version 99"):
            self.resume(saved)
