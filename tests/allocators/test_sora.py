"""SoRA: the plain proximal loop as the twin, the steered penalty, and runs that end within their budget."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

import lorank
from lorank.allocators import SoRA, TrainingInfo
from lorank.allocators.sora import soft_threshold
from lorank.errors import ScheduleError
from lorank.lora import find_layers
from tests.allocators.runs import SHORT, adamw, run_loop, same_run
from tests.models import adapted, tiny_llama, token_batch

QUICK = SoRA(prune_every=2)


def test_the_soft_threshold() -> None:
    x = torch.tensor([-3.0, -1.0, -0.5, 0.0, 0.5, 1.0, 3.0])
    assert soft_threshold(x, torch.tensor(1.0)).tolist() == [-2, 0, 0, 0, 0, 0, 2]


def test_the_gates_are_those_of_a_proximal_loop() -> None:
    """Twin: plain autograd on gates that are part of the forward, 60 steps under a falling learning rate."""
    steps, gate_lr, l1 = 60, 3.0, 0.01
    model, other = (adapted(tiny_llama(1)).double() for _ in range(2))
    optimizer = adamw(model)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, steps)
    method = SoRA(l1=l1, gate_lr=gate_lr, until=1.0, prune_every=steps)
    ranks = lorank.attach(model, optimizer, method, total_steps=steps)

    layers = find_layers(other)
    gates = {name: torch.ones(layer.rank, dtype=torch.float64, requires_grad=True) for name, layer in layers.items()}
    for name, layer in layers.items():
        layer.gate = gates[name]
    twin = adamw(other)
    zeros = set()
    for step in range(steps - 1):
        model(**token_batch(seed=step)).loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()

        twin.param_groups[0]["lr"] = 1e-2 * (1 - 0.9 * step / steps)
        eta = gate_lr * (1 - 0.9 * step / steps)
        other(**token_batch(seed=step)).loss.backward()
        twin.step()
        twin.zero_grad()
        with torch.no_grad():
            for gate in gates.values():
                u = gate - eta * gate.grad
                gate.copy_(u.sign() * (u.abs() - eta * l1).relu())
                gate.grad = None
        expected = torch.cat(list(gates.values())).detach()
        torch.testing.assert_close(ranks.layers.gates.values, expected, rtol=1e-8, atol=1e-12)
        assert torch.equal(ranks.layers.gates.values == 0, expected == 0)
        zeros.add(int((expected == 0).sum()))
    assert len(zeros) > 3  # one gate after the other came to zero


class TestSteering:
    def test_the_budget_is_met_at_its_step_and_the_penalty_ends(self) -> None:
        ranks, _ = run_loop(QUICK, SHORT)
        records = ranks.history.allocations
        assert [record.step for record in records] == [2, 4, 5]
        assert [record.total_rank for record in records][-1] == 28
        assert all(record.details["l1"] > 0 for record in records)
        part, _ = run_loop(QUICK, SHORT, until=8)
        assert part.state["threshold"] == 0
        assert part.layers.gates.values.count_nonzero() == 28

    def test_every_step_takes_an_even_share_of_the_way_that_is_left(self) -> None:
        """With gradients of zero the largest gate outside the budget walks to zero in equal steps."""
        model = adapted(tiny_llama())
        layers = find_layers(model)
        method, run = SoRA(until=0.5), TrainingInfo(20, initial_ranks=layers.ranks)
        state = method.start(layers, run)
        gates = layers.gates
        gates.values.copy_(torch.linspace(0.1, 2, 56))
        largest = sorted(gates.values.tolist())[27]
        for step in range(1, 12):
            method.after_step(lorank.allocators.Context(step, run, model, layers, lr=1.0, peak_lr=1.0), state)
            if step <= 10:
                assert float(state["threshold"]) == pytest.approx(largest / 10, rel=1e-4)
        assert gates.values.count_nonzero() == 28
        assert float(gates.values.max()) == pytest.approx(2 - largest, rel=1e-4)

    def test_nothing_moves_while_the_learning_rate_is_zero_but_the_way_is_made_up_for(self) -> None:
        model = adapted(tiny_llama())
        optimizer = adamw(model)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, step / 3))  # starts at 0
        ranks = lorank.attach(model, optimizer, QUICK, total_steps=SHORT)
        for seed in range(SHORT):
            model(**token_batch(seed=seed)).loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        assert ranks.layers.total_rank == 28


class TestNamedPenalty:
    def test_a_strong_one_prunes_below_the_budget(self) -> None:
        ranks, _ = run_loop(SoRA(l1=0.018, prune_every=1, budget="50 ranks"), SHORT, random_B=True)
        assert 0 < ranks.layers.total_rank < 45

    def test_a_weak_one_is_helped_by_the_budget_at_its_step(self) -> None:
        ranks, _ = run_loop(SoRA(l1=1e-9, prune_every=2), SHORT)
        assert [r.total_rank for r in ranks.history.allocations] == [56, 56, 28, 28, 28]

    def test_one_that_switches_everything_off_is_said(self) -> None:
        with pytest.raises(ScheduleError, match=r"l1=10.0, gate_lr=10.0\): at step 2 every gate is zero.*smaller l1"):
            run_loop(SoRA(l1=10.0, prune_every=2), SHORT)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"l1": 0.0}, "l1=0.0"),
        ({"gate_lr": -1.0}, "gate_lr=-1.0"),
        ({"until": 1.5}, "until=1.5"),
        ({"prune_every": 0}, "prune_every=0"),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        SoRA(**settings)


def test_a_run_that_starts_within_its_budget_says_so(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "lorank"):
        ranks, _ = run_loop(SoRA(budget=4, prune_every=2), SHORT)
    assert "SoRA prunes down to its budget, but the 56 ranks" in caplog.text
    assert ranks.layers.total_rank == 56


def test_removing_ranks_whose_gate_is_zero_leaves_the_output_unchanged() -> None:
    model = adapted(tiny_llama()).double().eval()
    optimizer = adamw(model)
    ranks = lorank.attach(model, optimizer, SoRA(prune_every=1), total_steps=SHORT)
    carry_out, seen = ranks._carry_out, []

    def watched(allocation: Any, *rest: Any) -> None:
        with torch.no_grad():
            before = model(**token_batch()).logits
            carry_out(allocation, *rest)
            seen.append(len(allocation.plan))
            torch.testing.assert_close(model(**token_batch()).logits, before, rtol=1e-10, atol=1e-12)

    ranks._carry_out = watched  # type: ignore[method-assign]
    for seed in range(SHORT):
        model(**token_batch(seed=seed)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert sum(map(bool, seen)) >= 1
    assert ranks.layers.total_rank == 28


@pytest.mark.parametrize("stop", [3, 4, 7])
def test_resume_is_bitwise(stop: int) -> None:
    same_run(QUICK, stop)


def test_resume_is_bitwise_under_a_cap_alone() -> None:
    """Its number of ranks is that of the run's beginning, not of the moment it was resumed in."""
    same_run(SoRA(prune_every=1, budget={"max_lora_rank": 2}), 4)


@pytest.mark.parametrize("budget", [1.5, "2k params", {"percent": 10, "max_lora_rank": 3}])
def test_every_budget_is_kept(budget: Any) -> None:
    ranks, _ = run_loop(SoRA(prune_every=2, budget=budget), SHORT)
    assert ranks.budget.fits(ranks.layers.ranks)
    assert 0 < ranks.layers.total_rank < 56


def test_dora_keeps_one_rank_in_every_module() -> None:
    ranks, _ = run_loop(SoRA(prune_every=2, budget="16 ranks"), SHORT, use_dora=True)
    assert ranks.layers.total_rank <= 16
    assert min(ranks.layers.ranks.values()) == 1


def test_an_early_stop_keeps_the_budget() -> None:
    ranks, _ = run_loop(QUICK, SHORT, until=3)
    ranks.finish()
    assert ranks.layers.total_rank == 28
    assert ranks.layers.gates is None


def test_the_state_is_made_beside_the_gates() -> None:
    layers = find_layers(adapted(tiny_llama()))
    layers.model.to("meta")
    state = SoRA().start(layers, TrainingInfo(10, initial_ranks=layers.ranks))
    assert {tensor.device.type for tensor in state.values()} == {"meta"}
