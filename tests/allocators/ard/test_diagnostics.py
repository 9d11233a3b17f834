"""Each failure is named when it happens, warned of once, and not named otherwise."""

from __future__ import annotations

import itertools
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Trainer, TrainingArguments

import lorank
from lorank.allocators import ARDLoRA
from lorank.allocators.ard.diagnostics import SIGNATURES, count_reversals_, diagnose_, start_diagnostics, warn_
from tests.allocators import runs
from tests.allocators.runs import run_loop
from tests.models import adapted, tiny_llama, token_batch

SETTINGS = {"strength": 0.01, "tv": 0.1, "alpha_lr": 5e-5, "loss": 2.0}

ARD = "lorank.allocators.ard.allocator"


def start(groups: int = 20, rank: int = 8) -> dict[str, Tensor]:
    return start_diagnostics(torch.full((groups,), rank), float(groups * rank))


def quiet(state: dict[str, Tensor], **changes: Any) -> list[str]:
    return diagnose_(state, **{"total": 160.0, "at_minimum": 0.2, "loss": None, **changes})


def test_a_healthy_run_shows_nothing() -> None:
    state = start()
    rounded = torch.full((20,), 8)
    for look in range(12):
        rounded = rounded - (torch.arange(20) % 5 == look).long()  # ranks fall, each a few times, none turns back
        count_reversals_(state, rounded)
        assert quiet(state, total=160.0 - look, at_minimum=0.05 * look, loss=4.0 - 0.1 * look) == []


def test_collapse() -> None:
    state = start()
    assert quiet(state, at_minimum=0.9) == []
    assert quiet(state, at_minimum=1.0) == ["rank_collapse"]


def test_explosion_needs_twice_the_ranks_that_still_grow() -> None:
    state = start()
    shown = [quiet(state, total=total) for total in (200.0, 300.0, 330.0, 360.0, 390.0, 390.0)]
    assert shown == [[], [], [], ["rank_explosion"], ["rank_explosion"], []]
    state = start()
    assert all(quiet(state, total=total) == [] for total in (200.0, 220.0, 240.0, 260.0, 280.0))


def test_oscillation_needs_many_groups_that_turn_back_often() -> None:
    state, few = start(), start()
    for step in range(8):
        count_reversals_(state, torch.full((20,), 8) - torch.tensor([step % 2] * 5 + [0] * 15))
        count_reversals_(few, torch.full((20,), 8) - torch.tensor([step % 2] * 2 + [0] * 18))
    assert quiet(state) == ["oscillation"]
    assert quiet(few) == []
    for _ in range(3):
        quiet(state)
    assert quiet(state) == []  # counted anew: it is over


def test_a_loss_that_never_falls() -> None:
    state, falling, late = start(), start(), start()
    shown = [quiet(state, loss=loss) for loss in (4.0, 4.1, 4.0, 4.2, 4.0, 4.05, 4.0)]
    assert shown[:5] == [[]] * 5
    assert shown[5:] == [["no_convergence"]] * 2
    assert not any(quiet(falling, loss=loss) for loss in (4.0, 3.9, 4.1, 4.1, 4.1, 4.1, 4.1))
    assert not any(quiet(late, loss=None) for _ in range(9))
    assert quiet(falling, loss=math.nan) == ["no_convergence"]


def test_each_is_warned_of_once_with_its_remedy(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "lorank")
    state = start()
    remedies = {
        "rank_collapse": "Lower l1",
        "rank_explosion": "Raise l1",
        "oscillation": "Raise tv",
        "no_convergence": "learning rates",
    }
    for name, remedy in remedies.items():
        caplog.clear()
        assert warn_(state, [name], 7, **SETTINGS)
        assert remedy in caplog.text
        assert name.replace("_", " ") in caplog.text
        caplog.clear()
        assert not warn_(state, [name], 8, **SETTINGS)
        assert not caplog.text
    assert not warn_(state, [], 9, **SETTINGS)


def named_in(ranks: Any) -> set[str]:
    return {name for record in ranks.history.allocations for name in record.details.get("signatures", [])}


def test_a_real_run_collapses(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "lorank")
    ranks, _ = run_loop(ARDLoRA(l1=10.0, alpha_lr=0.2, resize_every=2, hold=1), 12)
    assert named_in(ranks) == {"rank_collapse"}
    assert caplog.text.count("rank collapse") == 1


def test_a_budget_that_leaves_no_choice_is_no_collapse() -> None:
    ranks, _ = run_loop(ARDLoRA(l1=10.0, alpha_lr=0.2, resize_every=2, hold=1, budget="31 ranks"), 12)
    assert named_in(ranks) == set()


def test_a_real_run_explodes(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "lorank")
    monkeypatch.setattr(f"{ARD}.task_gradient", lambda *args: -torch.ones_like(args[2]))
    ranks, _ = run_loop(ARDLoRA(l1=0.0, alpha_lr=0.1, resize_every=2, hold=1, r0=1), 24)
    assert named_in(ranks) == {"rank_explosion"}
    assert caplog.text.count("rank explosion") == 1


def test_a_real_run_oscillates(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "lorank")
    sign = itertools.cycle([1.0, 1.0, -1.0, -1.0])
    monkeypatch.setattr(f"{ARD}.task_gradient", lambda *args: next(sign) * torch.ones_like(args[2]))
    monkeypatch.setattr(f"{ARD}.adam_step_", lambda alpha, grad, state, lr: alpha.sub_(lr * grad))
    ranks, _ = run_loop(ARDLoRA(l1=0.0, alpha_lr=0.1, resize_every=5, hold=1), 24)
    assert named_in(ranks) == {"oscillation"}
    assert caplog.text.count("oscillation") == 1


def test_a_real_run_does_not_converge(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "lorank")
    frozen = runs.adamw
    monkeypatch.setattr(runs, "adamw", lambda model: frozen(model, lr=1e-12))
    ranks, _ = run_loop(ARDLoRA(alpha_lr=0.02, resize_every=2, hold=1), 24)
    assert named_in(ranks) == {"no_convergence"}
    assert caplog.text.count("no convergence") == 1


def test_a_real_run_that_is_well_names_none(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "lorank")
    ranks, _ = run_loop(ARDLoRA(alpha_lr=0.02, resize_every=2, hold=1, l1=1e-3), 24)
    assert len(ranks.history.allocations) > 2
    assert not any(record.details.get("signatures") for record in ranks.history.allocations)
    assert not any(signature.replace("_", " ") in caplog.text for signature in SIGNATURES)


def test_the_trainer_hands_on_a_validation_batch_that_it_is_given(tmp_path: Path) -> None:
    rows = [{key: value[i] for key, value in token_batch(4).items()} for i in range(4)]
    callback = lorank.RankCallback(ARDLoRA(alpha_lr=0.1, resize_every=2), validation_batch=rows)
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=5, report_to="none", disable_tqdm=True, use_cpu=True, save_strategy="no"
    )
    Trainer(adapted(tiny_llama(), random_B=False), arguments, train_dataset=rows, callbacks=[callback]).train()
    assert callback.ranks is not None
    assert len(callback.ranks.state["seen.losses"]) == 3  # at the start and at steps 2 and 4
