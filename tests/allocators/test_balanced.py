"""BalancedLoRA: when it cuts, to what, at which rate, and that what it keeps is what it says."""

from __future__ import annotations

import copy
import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import lorank
from lorank.allocators import BalancedLoRA, Budget, Context, TrainingInfo
from lorank.errors import ScheduleError, ValidationBatchError
from lorank.lora import find_layers
from lorank.scoring import balance, measure_gramians
from tests.allocators.runs import SHORT, adamw, run_loop, same_run
from tests.models import adapted, tiny_llama, token_batch

QUICK = BalancedLoRA(wide=2, until=0.7, init="default")
"""Cuts after steps 2, 5 and 7 of 10."""


def attach(
    allocator: BalancedLoRA, total_steps: int = SHORT, *, optimizer: Any = None, model: Any = None, **settings: Any
) -> tuple[Any, Any, Any]:
    model = adapted(tiny_llama(1), random_B=False) if model is None else model
    optimizer = adamw(model) if optimizer is None else optimizer(model)
    settings = {"train_batches": [token_batch(seed=50)], **settings}
    return model, optimizer, lorank.attach(model, optimizer, allocator, total_steps=total_steps, seed=3, **settings)


def train_step(model: Any, optimizer: Any, seed: int = 0) -> None:
    model(**token_batch(seed=seed)).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def train(model: Any, optimizer: Any, ranks: Any, until: int | None = None) -> None:
    while ranks.step < (ranks.info.total_steps if until is None else until):
        train_step(model, optimizer, ranks.step)


def assert_used(budget: Any, ranks: Any) -> None:
    """The ranks fit, and no rank that the last cut took away would fit beside them."""
    *_, before, after = ranks.history
    assert ranks.layers.ranks == after.ranks
    assert budget.fits(after.ranks)
    assert not any(budget.room(after.ranks, name) for name, rank in before.ranks.items() if rank > after.ranks[name])


class TestSchedule:
    @pytest.mark.parametrize(
        ("settings", "total", "steps"),
        [
            ({}, 100, [10, 20, 30]),
            ({}, 800, [80, 160, 240]),
            ({"cuts": 1}, 10, [3]),
            ({"cuts": 4, "until": 0.5}, 80, [10, 20, 30, 40]),
            ({}, 1, [1]),
            ({}, 4, [1]),
            ({}, 7, [1, 2]),
        ],
    )
    def test_cuts_are_at_equal_distances(self, settings: dict[str, Any], total: int, steps: list[int]) -> None:
        assert BalancedLoRA(**settings).schedule(TrainingInfo(total)) == steps

    def test_budgets_follow_the_cubic_of_adalora(self) -> None:
        """1 + 3 (1 − i/3)³ times the budget: 4, 1 + 8/9, 1 + 1/9, 1."""
        model, optimizer, ranks = attach(BalancedLoRA("40 ranks", cuts=3, until=0.6, init="default"))
        used = [ranks.layers.total_rank]
        for _ in range(6):
            train_step(model, optimizer)
            used.append(ranks.layers.total_rank)
        assert used == [160, 160, 75, 75, 44, 44, 40]

    @pytest.mark.parametrize("total", range(1, 13))
    @pytest.mark.parametrize("settings", [{}, {"until": 0.99, "cuts": 5}], ids=["defaults", "many late cuts"])
    def test_a_run_of_any_length_ends_at_its_budget(self, total: int, settings: dict[str, Any]) -> None:
        model, optimizer, ranks = attach(BalancedLoRA(**settings), total)
        before = ranks.layers.parameters
        train(model, optimizer, ranks)
        assert ranks.finished
        assert_used(ranks.budget, ranks)
        assert ranks.layers.parameters < before
        assert all(weight.isfinite().all() for weight in model.parameters())
        # Where nothing has been watched before the cut, no module loses everything to the others.
        assert sum(rank > 0 for rank in ranks.layers.ranks.values()) >= 4

    @pytest.mark.parametrize("field", [{"wide": 0.5}, {"cuts": 0}, {"until": 0}, {"until": 1}, {"lr_power": -1}])
    def test_settings_out_of_range(self, field: dict[str, float]) -> None:
        with pytest.raises(ScheduleError, match=f"{next(iter(field))}="):
            BalancedLoRA(**field)


@pytest.mark.parametrize("init", ["gradient", "default"])
@pytest.mark.parametrize(
    "budget",
    [
        None,
        2,
        "9 ranks",
        "700 params",
        "1.5% of base",
        "40% of adapter",
        {"bytes": 2800},
        {"ranks_per_module": 2, "max_lora_rank": 3},
        {"max_lora_rank": 4},
    ],
    ids=str,
)
def test_the_budget_is_met_at_every_stage_in_every_unit(budget: Any, init: Any) -> None:
    """And used as far as ranks that are there allow."""
    model = adapted(tiny_llama(1), random_B=False)
    made = find_layers(model).ranks
    resolved = Budget.parse("100% of adapter" if budget is None else budget).resolve(find_layers(model), made)
    model, optimizer, ranks = attach(BalancedLoRA(budget, init=init, until=0.6), model=model)
    most = {name: layer.max_rank for name, layer in ranks.layers.items()}
    assert resolved.times(4, most).fits(ranks.layers.ranks)
    assert not resolved.fits(ranks.layers.ranks)
    assert ranks.budget.describe() == resolved.describe()
    for step in range(1, SHORT + 1):
        train_step(model, optimizer, step)
        done = sum(step >= cut for cut in (2, 4, 6))
        stage = resolved.times(1 + 3 * (1 - done / 3) ** 3, most)
        assert stage.fits(ranks.layers.ranks)
        if step in (2, 4, 6):
            assert_used(stage, ranks)
    assert resolved.fits(ranks.layers.ranks)


def test_wide_one_never_exceeds_the_budget() -> None:
    model, optimizer, ranks = attach(BalancedLoRA(3, wide=1))
    for step in range(SHORT):
        assert ranks.budget.fits(ranks.layers.ranks)
        train_step(model, optimizer, step)
    assert_used(ranks.budget, ranks)


class TestDecision:
    def test_ranks_of_the_highest_worth_per_parameter_stay_and_the_loss_grows_by_what_was_predicted(self) -> None:
        """The Gramians of the last half before the cut are those of a twin that measures on the same batches.

        At a rate of zero the weights of all these steps are the same, so that the twin may measure afterwards.
        """
        model, optimizer, ranks = attach(
            BalancedLoRA("50% of adapter", wide=2, cuts=1, until=0.4, init="default"),
            model=adapted(tiny_llama(1)).double(),
            optimizer=lambda model: torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0),
        )
        for step in range(3):
            train_step(model, optimizer, step)
        batches = [token_batch(seed=seed) for seed in (2, 3)]  # steps 3 and 4, of 4
        layers = ranks.layers
        found = {n: balance(layers[n], pair) for n, pair in measure_gramians(model, layers, batches).items()}
        values = ranks.budget.per_cost({name: one.worth for name, one in found.items()})
        kept = ranks.budget.keep_best(values)
        expected = {name: (one.basis.matrix @ layers[name].A.detach())[list(kept[name])] for name, one in found.items()}
        train_step(model, optimizer, 3)
        (record,) = ranks.history.allocations
        assert layers.ranks == {name: len(some) for name, some in kept.items()}
        for name, rows in expected.items():
            overlap = torch.nn.functional.cosine_similarity(layers[name].A.detach(), rows)  # up to its sign
            torch.testing.assert_close(overlap.abs(), torch.ones(len(rows)).double(), rtol=1e-6, atol=0)
        for name, one in found.items():
            assert record.scores[name] == pytest.approx(one.worth.tolist(), rel=1e-6, abs=1e-12)
        lost = sum(float(one.worth.sum() - one.worth[list(kept[name])].sum()) for name, one in found.items()) / 2
        total = sum(float(one.worth.sum()) for one in found.values()) / 2
        assert record.details["predicted_loss_increase"] == pytest.approx(lost, rel=1e-6)
        assert record.details["worth_kept"] == pytest.approx(1 - lost / total, rel=1e-6)
        assert record.details["gramians"] == "2 training steps"

    def test_a_cut_that_takes_nothing_away_leaves_the_function_and_the_moments_product(self) -> None:
        """wide=1: all ranks stay, in another basis."""
        model, optimizer, ranks = attach(
            BalancedLoRA(wide=1, cuts=1, until=0.4, init="default"), model=adapted(tiny_llama(1)).double()
        )
        for step in range(3):
            train_step(model, optimizer, step)
        layer = next(iter(ranks.layers.values()))

        @torch.no_grad()
        def logits() -> Tensor:
            found = model.eval()(**token_batch(seed=9)).logits
            model.train()
            return found

        model(**token_batch(seed=3)).loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = 0.0
        before, row = logits(), layer.A.detach().clone()
        moment = optimizer.state[layer.B]["exp_avg"].clone()
        optimizer.step()
        assert len(ranks.history.allocations) == 1
        assert not torch.allclose(layer.A, row)
        torch.testing.assert_close(logits(), before, rtol=1e-11, atol=1e-12)
        assert optimizer.state[layer.B]["exp_avg"].shape == moment.shape

    def test_with_a_gradient_start_the_directions_are_those_of_the_gradient(self) -> None:
        own, other = (adapted(tiny_llama(1), random_B=False) for _ in range(2))
        _, _, ranks = attach(BalancedLoRA(2), model=own)
        expected = lorank.gradient_start_(other, [token_batch(seed=50)], budget=8, seed=3)
        assert ranks.layers.ranks == expected
        for name, layer in find_layers(other).items():
            assert torch.equal(ranks.layers[name].A, layer.A)

    def test_train_batches_may_be_a_function_that_is_called_once_if_needed(self) -> None:
        calls: list[int] = []

        def batches() -> list[Any]:
            calls.append(1)
            return [token_batch(seed=50)]

        attach(BalancedLoRA(2), train_batches=batches)
        assert calls == [1]
        attach(QUICK, train_batches=batches)
        assert calls == [1]

    @pytest.mark.parametrize("given", [(), (lambda: [])], ids=["none", "a function"])
    def test_without_batches_the_error_says_what_to_do(self, given: Any) -> None:
        model = adapted(tiny_llama(1), random_B=False)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        with pytest.raises(ValidationBatchError, match=r"attach\(…, train_batches=\[batch, …\]\).*init=\"default\""):
            attach(BalancedLoRA(), model=model, train_batches=given)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        attach(QUICK, model=model, train_batches=given)


class TestLearningRate:
    def rates(self, ranks: Any, optimizer: Any) -> list[float]:
        """The rates that the optimiser's steps see."""
        seen: list[float] = []
        optimizer.register_step_pre_hook(lambda *_: seen.append(float(optimizer.param_groups[0]["lr"])))
        return seen

    @pytest.mark.parametrize("power", [0.5, 0.0, 1.0])
    def test_it_falls_with_the_live_width(self, power: float) -> None:
        model, optimizer, ranks = attach(BalancedLoRA("40 ranks", until=0.6, init="default", lr_power=power))
        seen = self.rates(ranks, optimizer)
        widths = []
        for step in range(8):
            widths.append(ranks.layers.total_rank / 40)
            train_step(model, optimizer, step)
            assert optimizer.param_groups[0]["lr"] == 1e-2
        assert widths[0] == 4
        assert seen == pytest.approx([1e-2 * width**-power for width in widths])
        assert seen[-1] == 1e-2

    def test_only_the_groups_of_the_adapter_change(self) -> None:
        def optimizer_of(model: Any) -> torch.optim.Optimizer:
            weights = [p for p in model.parameters() if p.requires_grad]
            head = model.base_model.model.lm_head.weight.requires_grad_()
            return torch.optim.AdamW(
                [{"params": weights[::2]}, {"params": [head], "lr": 3e-3}, {"params": weights[1::2], "lr": 2e-3}],
                lr=1e-2,
            )

        model = adapted(tiny_llama(1), random_B=False)
        model, optimizer, ranks = attach(QUICK, model=model, optimizer=optimizer_of)
        seen: list[list[float]] = []
        optimizer.register_step_pre_hook(lambda *_: seen.append([group["lr"] for group in optimizer.param_groups]))
        train_step(model, optimizer)
        factor = QUICK.lr_factor(Context(0, ranks.info, model, ranks.layers))
        assert 0.7 < factor < 0.72
        assert seen[0] == pytest.approx([1e-2 * factor, 3e-3, 2e-3 * factor])
        assert [group["lr"] for group in optimizer.param_groups] == [1e-2, 3e-3, 2e-3]

    @pytest.mark.parametrize("make", [torch.optim.AdamW, torch.optim.Adagrad], ids=["AdamW", "Adagrad"])
    def test_a_head_in_the_adapter_s_group_keeps_its_rate(self, make: Any) -> None:
        """The same weights, bit for bit, as with a group for each, over all cuts; and the same groups afterwards."""
        found = []
        for together in (True, False):

            def optimizer_of(model: Any, together: bool = together) -> torch.optim.Optimizer:
                head = model.base_model.model.lm_head.weight.requires_grad_()
                weights = [p for p in model.parameters() if p.requires_grad and p is not head]
                groups = [[*weights[:3], head, *weights[3:]]] if together else [weights, [head]]
                return make([{"params": params} for params in groups], lr=1e-2)

            model = adapted(tiny_llama(1), random_B=False)
            method = BalancedLoRA(wide=2, until=0.7, init="default")
            model, optimizer, ranks = attach(method, model=model, optimizer=optimizer_of)
            groups, sizes = list(optimizer.param_groups), [len(group["params"]) for group in optimizer.param_groups]
            seen: list[list[float]] = []
            optimizer.register_step_pre_hook(
                lambda *_, o=optimizer, s=seen: s.append([g["lr"] for g in o.param_groups])
            )
            for step in range(SHORT):
                train_step(model, optimizer, step)
                assert all(a is b for a, b in zip(optimizer.param_groups, groups, strict=True))
                assert [len(group["params"]) for group in optimizer.param_groups] == sizes
            assert seen[0] == pytest.approx([1e-2 * 2**-0.5, 1e-2])
            assert ranks.history.allocations
            found.append({name: value.clone() for name, value in model.state_dict().items()})
        assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())

    @pytest.mark.parametrize("kind", ["LinearLR", "LambdaLR", "OneCycleLR", "CosineAnnealingLR"])
    @pytest.mark.parametrize("tensor", [False, True], ids=["float", "tensor"])
    def test_schedules_see_the_user_s_rate(self, kind: str, tensor: bool) -> None:
        """The same rates, bit for bit, as with a method that leaves the rate alone."""
        make: dict[str, Any] = {
            "LinearLR": lambda o: torch.optim.lr_scheduler.LinearLR(o, 1.0, 0.1, SHORT),
            "LambdaLR": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
            "OneCycleLR": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 1e-2, SHORT + 1),
            "CosineAnnealingLR": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, SHORT),
        }
        found = []
        for power in (0.5, 0.0):
            model, optimizer, _ = attach(
                BalancedLoRA(lr_power=power, wide=2, until=0.7, init="default"),
                optimizer=lambda m: adamw(m, lr=torch.tensor(1e-2), foreach=False) if tensor else adamw(m),
            )
            given = optimizer.param_groups[0]["lr"]
            schedule, rates = make[kind](optimizer), []
            for step in range(SHORT):
                train_step(model, optimizer, step)
                schedule.step()
                rates.append(float(optimizer.param_groups[0]["lr"]))
            assert not tensor or optimizer.param_groups[0]["lr"] is given
            found.append(rates)
        assert found[0] == found[1]

    def test_after_a_step_that_failed(self) -> None:
        class Failing(torch.optim.AdamW):
            fails = False

            def step(self, closure: Any = None) -> Any:
                if self.fails:
                    raise RuntimeError("out of memory")
                return super().step(closure)

        made = lambda model: Failing([p for p in model.parameters() if p.requires_grad], lr=1e-2)  # noqa: E731
        for end in ("another step", "a rate of the user's", "detach"):
            model, optimizer, ranks = attach(QUICK, optimizer=made)
            seen = self.rates(ranks, optimizer)
            train_step(model, optimizer)
            optimizer.fails = True
            with pytest.raises(RuntimeError, match="out of memory"):
                train_step(model, optimizer)
            optimizer.fails = False
            if end == "a rate of the user's":
                optimizer.param_groups[0]["lr"] = 5e-3
            if end == "detach":
                ranks.detach()
                assert optimizer.param_groups[0]["lr"] == 1e-2
                continue
            train_step(model, optimizer)
            expected = 5e-3 if end == "a rate of the user's" else 1e-2
            assert optimizer.param_groups[0]["lr"] == expected
            assert max(seen) < expected * 1.5


class TestResume:
    @pytest.mark.parametrize("stop", [1, 2, 4, 6, 8])
    def test_bitwise(self, stop: int) -> None:
        """Before the first cut, right after it, between two, inside a window, after the last."""
        same_run(QUICK, stop)

    @pytest.mark.parametrize(
        "lora", [{"use_dora": True}, {"target_modules": ["embed_tokens", "v_proj"]}], ids=["dora", "embedding"]
    )
    def test_in_other_forms(self, lora: dict[str, Any]) -> None:
        same_run(QUICK, 4, **lora)

    @pytest.mark.parametrize("later", [5, 9, SHORT])
    def test_going_back_in_the_same_process(self, later: int) -> None:
        """To step 4, in the middle of a window, from a later step; the passes since then do not count."""
        model, optimizer, ranks = attach(QUICK)
        train(model, optimizer, ranks, 4)
        saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
        ends = []
        train(model, optimizer, ranks)
        ends.append(copy.deepcopy(dict(model.state_dict())))
        if later < SHORT:  # a run that has not ended
            model, optimizer, ranks = attach(QUICK)
            train(model, optimizer, ranks, later)
            model(**token_batch(seed=77)).loss.backward()
            optimizer.zero_grad()
        optimizer.load_state_dict(saved[1])
        model.load_state_dict(saved[0])
        assert ranks.step == 4
        train(model, optimizer, ranks)
        ends.append(dict(model.state_dict()))
        assert ends[0].keys() == ends[1].keys()
        assert all(torch.equal(value, ends[1][key]) for key, value in ends[0].items())

    def test_a_resumed_run_needs_no_training_batches(self) -> None:
        model, optimizer, ranks = attach(BalancedLoRA(2))
        train(model, optimizer, ranks, 2)
        weights, state = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
        other = adapted(tiny_llama(1), random_B=False)
        again = adamw(other)
        again.load_state_dict(state)
        resumed = lorank.attach(other, again, BalancedLoRA(2), total_steps=SHORT, seed=3)
        other.load_state_dict(weights)
        train(model, optimizer, ranks)
        train(other, again, resumed)
        assert resumed.layers.ranks == ranks.layers.ranks
        for name, layer in ranks.layers.items():
            assert torch.equal(layer.A, resumed.layers[name].A)

    def test_the_state_of_a_checkpoint_after_the_last_cut_is_small(self) -> None:
        ranks, _ = run_loop(QUICK, SHORT, until=5)
        assert sum(value.numel() for value in ranks.state.values()) > 100
        ranks, _ = run_loop(QUICK, SHORT, until=8)
        assert set(ranks.state) == {"steps"}


class TestEnds:
    @pytest.mark.parametrize("stop", [0, 1, 3, 6])
    def test_a_run_that_stops_early_meets_its_budget_at_its_finish(self, stop: int) -> None:
        model, optimizer, ranks = attach(QUICK)
        train(model, optimizer, ranks, stop)
        assert not ranks.budget.fits(ranks.layers.ranks)
        ranks.finish()
        assert_used(ranks.budget, ranks)
        assert ranks.finished

    def test_detached_midway_it_leaves_plain_lora_and_no_hook(self) -> None:
        model = adapted(tiny_llama(1), random_B=False, target_modules=["embed_tokens", "v_proj", "o_proj"])
        hooks = [len(module._forward_hooks) for module in model.modules()]
        model, optimizer, ranks = attach(QUICK, model=model)
        train(model, optimizer, ranks, 4)
        before, rank = model.eval()(**token_batch(seed=9)).logits, ranks.layers.total_rank
        ranks.detach()
        assert ranks.layers.total_rank == rank
        assert ranks.layers.gramians is None
        assert [len(module._forward_hooks) for module in model.modules()] == hooks
        assert not any("_embed" in vars(module) for module in model.modules())
        assert not any(layer.module.lora_variant for layer in ranks.layers.values())
        torch.testing.assert_close(model(**token_batch(seed=9)).logits, before, rtol=1e-5, atol=1e-6)

    def test_a_retry_goes_on_with_the_ranks_that_are_there_and_ends_at_the_same_budget(self) -> None:
        model, optimizer, ranks = attach(BalancedLoRA("50% of adapter"))
        limit = ranks.budget.describe()
        train(model, optimizer, ranks, 2)
        live = ranks.layers.ranks
        ranks.detach()
        again = lorank.attach(model, optimizer, BalancedLoRA("50% of adapter"), total_steps=SHORT)
        assert again.layers.ranks == live
        assert again.budget.describe() == limit
        train(model, optimizer, again)
        assert_used(again.budget, again)

    def test_a_second_run_of_a_trained_adapter_keeps_its_function_at_the_start(self) -> None:
        model = adapted(tiny_llama(1))
        before = model.eval()(**token_batch(seed=9)).logits
        model, optimizer, ranks = attach(BalancedLoRA("50% of adapter"), model=model)
        torch.testing.assert_close(model.eval()(**token_batch(seed=9)).logits, before, rtol=1e-5, atol=1e-6)
        model.train()
        train(model, optimizer, ranks)
        assert_used(ranks.budget, ranks)


@pytest.mark.parametrize("total", [2, 20])
def test_a_cut_without_a_gradient_to_judge_by_is_told(total: int, caplog: pytest.LogCaptureFixture) -> None:
    """In a run of two steps the first one has B = 0. With a validation batch ranks are scored on it."""
    model, optimizer, ranks = attach(BalancedLoRA(2, init="default"), total)
    train(model, optimizer, ranks)
    said = [record.details["gramians"] for record in ranks.history.allocations]
    assert (said[0] == "none") == (total == 2)
    assert ("every module keeps its first ranks" in caplog.text) == (total == 2)
    assert max(ranks.layers.ranks.values()) - min(ranks.layers.ranks.values()) <= 1 or total > 2
    model, optimizer, ranks = attach(BalancedLoRA(2, init="default"), total, validation_batch=token_batch(seed=99))
    train(model, optimizer, ranks)
    assert "none" not in [record.details["gramians"] for record in ranks.history.allocations]


class TestCompiled:
    """Passes cannot be watched: Gramians are measured on the validation batch."""

    def compiled(self, **settings: Any) -> tuple[Any, Any, Any]:
        torch.compiler.reset()
        model = adapted(tiny_llama(1), random_B=False, target_modules=["q_proj", "down_proj"])
        optimizer = adamw(model)
        outer = torch.compile(model, backend="eager")
        return outer, optimizer, lorank.attach(outer, optimizer, QUICK, total_steps=3, **settings)

    def test_it_needs_a_validation_batch(self) -> None:
        with pytest.raises(ValidationBatchError, match=r"torch\.compile hides.*validation_batch=batch"):
            self.compiled()
        with pytest.raises(ValidationBatchError, match="labels"):  # and tries it
            self.compiled(validation_batch={"input_ids": token_batch()["input_ids"]})

    def test_it_measures_there(self) -> None:
        model, optimizer, ranks = self.compiled(validation_batch=token_batch(seed=99))
        train(model, optimizer, ranks)
        assert_used(ranks.budget, ranks)
        assert {record.details["gramians"] for record in ranks.history.allocations} == {"the validation batch"}


def test_passes_whose_gradients_are_thrown_away_do_not_count() -> None:
    """A batch that the loop leaves out changes nothing, bit for bit."""
    found = []
    for extra in (False, True):
        model, optimizer, ranks = attach(QUICK)
        for step in range(SHORT):
            if extra:
                (model(**token_batch(seed=70 + step)).loss * 1e4).backward()
                optimizer.zero_grad(set_to_none=step % 2 == 0)
            train_step(model, optimizer, step)
        found.append([record.scores for record in ranks.history.allocations] + [ranks.layers.ranks])
    assert found[0] == found[1]


def test_it_learns_and_collects_only_when_it_must() -> None:
    """Windows are the last half before each cut: steps 2, 4–5 and 7 of 10."""
    model, optimizer, ranks = attach(QUICK)
    collected, losses = [], []
    for step in range(SHORT):
        gramians = ranks.layers.gramians
        gramians.clear()
        loss = model(**token_batch(seed=0)).loss
        loss.backward()
        losses.append(loss.item())
        if any(own.Z is not None for own in gramians.sums.values()):
            collected.append(step + 1)
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    assert collected == [1, 2, 4, 5, 7]  # the first: collecting begins with the run
    assert math.isfinite(sum(losses))
    assert [record.step for record in ranks.history.allocations] == [2, 5, 7]
    assert all(a.ranks != b.ranks for a, b in itertools.pairwise(ranks.history))
