"""AdaLoRA: PEFT's own bookkeeping as the twin, the schedule, the penalty, and runs that end within their budget."""

from __future__ import annotations

import logging
import math
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, get_peft_model
from torch import nn

import lorank
from lorank.allocators import AdaLoRA, Context, TrainingInfo
from lorank.allocators.orthogonality import add_orthogonality_gradient_
from lorank.allocators.schedule import CubicSchedule
from lorank.errors import ScheduleError
from lorank.lora import find_layers
from tests.allocators.runs import SHORT, adamw, run_loop, same_run
from tests.models import adapted, tiny_llama, token_batch

QUICK = AdaLoRA(t_init=2, t_final=3, delta_t=2)


class TestPeftsOwn:
    """Both are given the same weights and the same gradients, 70 steps through all phases, in float64."""

    STEPS, T_INIT, T_FINAL, DELTA_T, R = 70, 10, 15, 3, 6

    def modules(self) -> nn.Module:
        torch.manual_seed(0)
        return nn.ModuleDict({"a": nn.Linear(9, 7), "b": nn.Linear(7, 11), "c": nn.Linear(12, 8)}).double()

    def theirs(self) -> Any:
        config = AdaLoraConfig(
            init_r=self.R,
            target_r=self.R // 2,
            tinit=self.T_INIT,
            tfinal=self.T_FINAL,
            deltaT=self.DELTA_T,
            total_step=self.STEPS,
            lora_alpha=self.R,
            target_modules=["a", "b", "c"],
        )
        return get_peft_model(self.modules(), config).double()

    def test_scores_budgets_and_masks(self) -> None:
        model = adapted(self.modules(), r=self.R, random_B=False, target_modules=["a", "b", "c"]).double()
        layers, run = find_layers(model), TrainingInfo(self.STEPS, initial_ranks=dict.fromkeys("abc", self.R))
        ours = AdaLoRA(self.T_INIT, self.T_FINAL, self.DELTA_T, orthogonality=0.1)
        falling = CubicSchedule(self.T_INIT, self.T_FINAL, self.DELTA_T)
        state = ours.start(layers, run)
        peft_model = self.theirs()
        twin = peft_model.base_model.rankallocator
        svd = {name: peft_model.base_model.model[name] for name in "abc"}
        with torch.no_grad():
            for name, layer in layers.items():
                svd[name].lora_A["default"].copy_(layer.A)
                svd[name].lora_B["default"].copy_(layer.B)
        own = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-2)
        vectors = [w for m in svd.values() for w in (m.lora_A["default"], m.lora_B["default"])]
        values = [m.lora_E["default"] for m in svd.values()]
        their = torch.optim.AdamW([{"params": vectors}, {"params": values, "weight_decay": 0.0}], lr=3e-2)
        random = torch.Generator().manual_seed(1)
        masks = returned = 0
        dead: set[int] = set()
        for step in range(1, self.STEPS - self.T_FINAL + 1):
            for optimizer in (own, their):
                optimizer.zero_grad()
            assert layers.gates is not None
            layers.gates.clear_grad()
            # a loss that is linear in ΔW; its slope is drawn anew at each step, and the modules' turns come and go
            slopes = {
                name: torch.randn(layer.d_out, layer.d_in, generator=random, dtype=torch.float64)
                * math.exp(2 * math.sin(step / 5 + i))
                for i, (name, layer) in enumerate(layers.items())
            }
            loss = sum((slopes[n] * ((x.B * x.gate) @ x.A)).sum() for n, x in layers.items())
            loss.backward()
            loss = torch.zeros((), dtype=torch.float64)
            for n, m in svd.items():
                P, values_, Q = m.lora_B["default"], m.lora_E["default"], m.lora_A["default"]
                eye = torch.eye(self.R, dtype=torch.float64)
                penalty = (P.T @ P - eye).square().sum() + (Q @ Q.T - eye).square().sum()
                loss = loss + (slopes[n] * (P @ (values_ * Q))).sum() + 0.1 * penalty
            loss.backward()

            context = Context(step - 1, run, model, layers, lr=3e-2, peak_lr=3e-2)
            ours.before_step(context, state)
            twin.update_ipt(peft_model.base_model.model)
            own.step()
            their.step()
            context = Context(step, run, model, layers, lr=3e-2, peak_lr=3e-2)
            ours.after_step(context, state)

            budget, due = twin.budget_schedule(step)
            due = due or step == self.STEPS - self.T_FINAL  # where PEFT's model forces a mask
            assert ours.due(step, run) == due
            resolved = ours.resolve_budget(layers, run).relaxed(run.initial_ranks, falling.fraction(step, run))
            assert resolved.constraints[0].limit == budget
            if due:
                masks += 1
                allocation = ours.allocate(context, state)
                twin.mask_to_budget(peft_model.base_model.model, budget)
                for name, scores in allocation.scores.items():
                    stem = f"{name}.%s.default"
                    expected = (
                        twin._element_score(stem % "lora_E").view(-1)
                        + twin._element_score(stem % "lora_A").mean(1)
                        + twin._element_score(stem % "lora_B").mean(0)
                    )
                    torch.testing.assert_close(scores, expected.detach(), rtol=1e-10, atol=0)
                assert allocation.details["budget"]["ranks"] == {"used": budget, "limit": budget}
                zero = {int(i) for i in (layers.gates.values == 0).nonzero()}
                returned += len(dead - zero)
                dead = zero
            expected = torch.cat([m.lora_E["default"].view(-1) for m in svd.values()])
            torch.testing.assert_close(layers.gates.values, expected.detach(), rtol=1e-9, atol=1e-14)
            assert torch.equal(layers.gates.values == 0, expected == 0)
        assert masks > 10
        assert returned > 0  # triplets came back from a mask, as they may
        assert {name: change.rank for name, change in allocation.plan.items()} == {
            name: int(m.lora_E["default"].count_nonzero()) for name, m in svd.items()
        }


class TestSchedule:
    def test_the_defaults_are_parts_of_the_run(self) -> None:
        steps = AdaLoRA().schedule(TrainingInfo(1000))
        assert (steps[0], steps[-1], steps[1] - steps[0]) == (132, 520, 2)

    def test_masks_come_between_the_phases_and_at_their_end(self) -> None:
        assert AdaLoRA(t_init=10, t_final=30, delta_t=5).schedule(TrainingInfo(100)) == [
            15,
            20,
            25,
            30,
            35,
            40,
            45,
            50,
            55,
            60,
            65,
            70,
        ]

    @pytest.mark.parametrize("steps", [1, 2, 3, 7])
    def test_a_very_short_run_still_prunes(self, steps: int) -> None:
        ranks, _ = run_loop(AdaLoRA(), steps)
        assert ranks.layers.total_rank == 28

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"t_init": -1}, "t_init=-1"),
            ({"delta_t": 0}, "delta_t=0"),
            ({"beta1": 1.0}, "beta1=1.0"),
            ({"orthogonality": -0.1}, "orthogonality=-0.1"),
        ],
    )
    def test_settings_out_of_range(self, settings: dict[str, Any], message: str) -> None:
        with pytest.raises(ScheduleError, match=message):
            AdaLoRA(**settings)

    def test_phases_that_leave_no_room(self) -> None:
        with pytest.raises(ScheduleError, match=r"t_init=6, t_final=4\) leaves no step .* a run of 10 steps"):
            AdaLoRA(t_init=6, t_final=4).start(find_layers(adapted(tiny_llama())), TrainingInfo(10))

    def test_a_run_that_starts_within_its_budget_says_so_and_keeps_its_ranks(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        with caplog.at_level(logging.WARNING, "lorank"):
            ranks, _ = run_loop(AdaLoRA(budget=4), SHORT)
        assert (
            "the 56 ranks that the adapter was made with are already within it: no rank will be pruned" in caplog.text
        )
        assert ranks.layers.total_rank == 56


def test_the_penalty_is_the_gradient_of_the_squared_norms() -> None:
    model = adapted(tiny_llama(), r=3).double()
    layers = find_layers(model)
    loss = torch.zeros((), dtype=torch.float64)
    for layer in layers.values():
        eye = torch.eye(layer.rank, dtype=torch.float64)
        loss = loss + (layer.B.T @ layer.B - eye).square().sum() + (layer.A @ layer.A.T - eye).square().sum()
    weights = [weight for layer in layers.values() for weight in (layer.A, layer.B)]
    expected = torch.autograd.grad(0.3 * loss, weights)
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    weights[0].grad = None  # the loss did not reach it
    add_orthogonality_gradient_(layers, 0.3)
    assert weights[0].grad is None
    for weight, gradient in zip(weights[1:], expected[1:], strict=True):
        torch.testing.assert_close(weight.grad, 1 + gradient, rtol=1e-10, atol=1e-12)


class TestStart:
    def test_a_new_adapter_is_random_and_changes_nothing(self) -> None:
        model = adapted(tiny_llama(), random_B=False).eval()
        before = model(**token_batch()).logits
        layers = find_layers(model)
        AdaLoRA().start(layers, TrainingInfo(100, seed=3))
        assert torch.equal(model(**token_batch()).logits, before)
        assert not layers.gates.values.any()
        deviations = torch.stack([layer.B.std() * (3 * layer.d_out) ** 0.5 for layer in layers.values()])
        assert ((deviations > 0.8) & (deviations < 1.2)).all()
        again = find_layers(adapted(tiny_llama(), random_B=False))
        AdaLoRA().start(again, TrainingInfo(100, seed=3))
        other = find_layers(adapted(tiny_llama(), random_B=False))
        AdaLoRA().start(other, TrainingInfo(100, seed=4))
        name = next(iter(layers))
        assert torch.equal(layers[name].B, again[name].B)
        assert not torch.equal(layers[name].B, other[name].B)

    def test_a_trained_adapter_starts_as_it_is(self) -> None:
        layers = find_layers(adapted(tiny_llama()))
        weights = {name: layer.B.detach().clone() for name, layer in layers.items()}
        AdaLoRA().start(layers, TrainingInfo(100))
        assert (layers.gates.values == 1).all()
        assert all(torch.equal(layer.B, weights[name]) for name, layer in layers.items())


class TestRuns:
    def test_masks_then_removes_and_ends_at_half_the_ranks(self) -> None:
        ranks, _ = run_loop(QUICK, SHORT)
        records = ranks.history.allocations
        assert [record.step for record in records] == [4, 6, 7]
        assert [sum(record.active.values()) for record in records] == [
            record.details["budget"]["ranks"]["limit"] for record in records
        ]
        assert [record.total_rank for record in records] == [56, 56, 28]
        assert [bool(record.pruned) for record in records] == [False, False, True]
        assert ranks.layers.gates is None  # folded
        assert len(set(ranks.layers.ranks.values())) > 1

    def test_removing_masked_triplets_leaves_the_output_unchanged(self) -> None:
        model = adapted(tiny_llama()).double().eval()
        optimizer = adamw(model)
        ranks = lorank.attach(model, optimizer, QUICK, total_steps=SHORT)
        outputs = []

        carry_out = ranks._carry_out

        def spy(allocation: Any, *rest: Any) -> None:
            with torch.no_grad():
                outputs.append(model(**token_batch()).logits)
                carry_out(allocation, *rest)
                outputs.append(model(**token_batch()).logits)

        ranks._carry_out = spy  # type: ignore[method-assign]
        for seed in range(SHORT):
            model(**token_batch(seed=seed)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        assert ranks.layers.total_rank == 28
        torch.testing.assert_close(outputs[-1], outputs[-2], rtol=1e-10, atol=1e-12)

    @pytest.mark.parametrize("stop", [3, 5, 8])
    def test_resume_is_bitwise(self, stop: int) -> None:
        same_run(QUICK, stop)

    @pytest.mark.parametrize("budget", [1.5, "2k params", {"percent": 10, "max_lora_rank": 3}])
    def test_every_budget_is_kept(self, budget: Any) -> None:
        ranks, _ = run_loop(AdaLoRA(2, 3, 2, budget=budget), SHORT)
        assert ranks.budget.fits(ranks.layers.ranks)
        assert ranks.layers.total_rank < 56

    def test_dora_keeps_one_rank_in_every_module(self) -> None:
        ranks, _ = run_loop(AdaLoRA(2, 3, 2, budget="16 ranks"), SHORT, use_dora=True)
        assert ranks.layers.total_rank == 16
        assert min(ranks.layers.ranks.values()) == 1

    def test_an_early_stop_keeps_the_budget(self) -> None:
        ranks, _ = run_loop(QUICK, SHORT, until=5)
        ranks.finish()
        assert ranks.layers.total_rank == 28
        assert ranks.layers.gates is None


def test_the_singular_values_train_as_if_they_were_in_the_optimiser() -> None:
    """The twin: the same gates as a parameter of AdamW (without weight decay), under a learning-rate schedule."""
    method = AdaLoRA(t_init=28, t_final=1, orthogonality=0.0)
    model, other = (adapted(tiny_llama(1)).double() for _ in range(2))
    optimizer = adamw(model, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, 30)
    ranks = lorank.attach(model, optimizer, method, total_steps=30)
    layers = find_layers(other)
    gates = layers.learn_gates(torch.ones(layers.total_rank, dtype=torch.float64))
    weights = [p for p in other.parameters() if p.requires_grad]
    twin = torch.optim.AdamW([*weights, *gates.leaves.values()], lr=1e-2, weight_decay=0.0)
    twin_schedule = torch.optim.lr_scheduler.LinearLR(twin, 1.0, 0.1, 30)
    for seed in range(28):
        for each, steps, rates in ((model, optimizer, schedule), (other, twin, twin_schedule)):
            each(**token_batch(seed=seed)).loss.backward()
            steps.step()
            rates.step()
            steps.zero_grad(set_to_none=False)
        torch.testing.assert_close(ranks.layers.gates.values, gates.values, rtol=1e-9, atol=1e-12)
    assert (gates.values - 1).abs().max() > 0.05
