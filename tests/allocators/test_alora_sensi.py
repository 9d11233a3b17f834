"""ALoRA-Sensi: its score is that of a triplet with Λ = 1, and its rounds are ALoRA's."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import lorank
from lorank.allocators import ALoRA, ALoRASensi, TrainingInfo
from lorank.errors import ScheduleError
from lorank.lora import find_layers
from tests.allocators.runs import SHORT, adamw, run_loop, same_run
from tests.models import adapted, tiny_llama, token_batch

QUICK = ALoRASensi(k1=2, k2=2, rounds=3, unit="steps", per_round=6)


def test_scores_are_those_of_gates_that_stay_at_one() -> None:
    """Twin: a model with real gates of one, whose gradients autograd gives, through two rounds."""
    model, other = (adapted(tiny_llama()).double() for _ in range(2))
    optimizer = adamw(model)
    ranks = lorank.attach(model, optimizer, ALoRASensi(k1=5, rounds=1, unit="steps"), total_steps=6)
    layers = find_layers(other)
    gates = layers.learn_gates(torch.ones(layers.total_rank, dtype=torch.float64))
    twin = adamw(other)
    mean: dict[str, Any] = {}
    uncertainty: dict[str, Any] = {}
    for seed in range(5):
        for each, steps in ((model, optimizer), (other, twin)):
            each(**token_batch(seed=seed)).loss.backward()
            if each is other:
                for name, layer in layers.items():
                    for key, weight in ((name + "A", layer.A), (name + "B", layer.B), (name + "g", layer.gate)):
                        now = (weight * weight.grad).abs().detach()
                        mean[key] = 0.85 * mean.get(key, 0 * now) + 0.15 * now
                        uncertainty[key] = 0.85 * uncertainty.get(key, 0 * now) + 0.15 * (now - mean[key]).abs()
            steps.step()
            steps.zero_grad()
        gates.clear_grad()
    (record,) = ranks.history.allocations
    for name, scores in record.scores.items():
        s = {kind: mean[name + kind] * uncertainty[name + kind] for kind in "ABg"}
        expected = s["g"] + s["A"].mean(1) + s["B"].mean(0)
        torch.testing.assert_close(torch.tensor(scores, dtype=torch.float64), expected, rtol=1e-8, atol=0)


def test_its_schedule_and_its_errors_are_aloras() -> None:
    settings, run = {"k1": 0.5, "k2": 0.1, "rounds": 4, "unit": "epochs"}, TrainingInfo(1000, steps_per_epoch=100)
    assert ALoRASensi(**settings).schedule(run) == ALoRA(**settings).schedule(run)
    with pytest.raises(ScheduleError, match=r"ALoRASensi\(rounds=0\)"):
        ALoRASensi(rounds=0)
    with pytest.raises(ScheduleError, match=r"ALoRASensi\(unit='hours'\)"):
        ALoRASensi(unit="hours")  # type: ignore[arg-type]
    with pytest.raises(ScheduleError, match=r"beta2=1\.0"):
        ALoRASensi(beta2=1.0)
    with pytest.raises(ScheduleError, match="ALoRASensi would prune n_A = 14"):
        ALoRASensi(per_round=14).start(find_layers(adapted(tiny_llama(), r=1)), run)


def test_ranks_move_without_a_validation_batch_and_the_memory_is_freed() -> None:
    ranks, _ = run_loop(QUICK, SHORT)
    assert [record.step for record in ranks.history.allocations] == [2, 4, 6]
    assert not QUICK.needs_validation_batch
    assert len(set(ranks.layers.ranks.values())) > 1
    assert ranks.layers.total_rank <= 56
    assert ranks.state == {}


@pytest.mark.parametrize("stop", [3, 4, 7])
def test_resume_is_bitwise(stop: int) -> None:
    same_run(QUICK, stop)


@pytest.mark.parametrize("budget", [2, "3k params"])
def test_the_budget_is_kept_at_every_moment(budget: Any) -> None:
    ranks, _ = run_loop(ALoRASensi(k1=2, k2=2, rounds=3, unit="steps", per_round=6, budget=budget), SHORT)
    assert all(ranks.budget.fits(record.ranks) for record in ranks.history)


def test_dora() -> None:
    ranks, _ = run_loop(QUICK, SHORT, use_dora=True)
    assert min(ranks.layers.ranks.values()) >= 1
    assert len(set(ranks.layers.ranks.values())) > 1
