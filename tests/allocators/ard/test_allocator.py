"""ARD-LoRA: α against a naive twin, what is saved, how a run ends, how it is resumed."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn

import lorank
from lorank.allocators import ARDLoRA, Context, TrainingInfo
from lorank.allocators.ard import allocator
from lorank.allocators.ard.masks import temperature
from lorank.errors import AdapterError, BudgetError, ScheduleError, ValidationBatchError
from lorank.lora import HeadGroups, Plan, find_layers
from tests.allocators.runs import adamw, run_loop, same_run
from tests.models import adapted, tiny_gpt2, tiny_llama, token_batch

FAST: dict[str, Any] = {"alpha_lr": 0.05, "resize_every": 2, "hold": 1, "l1": 0.05}
"""Settings under which ranks move within ten steps."""

STEPS = 60


class TwinHeads(nn.Module):
    """The update of one module, head by head, the masks in the graph."""

    def __init__(self, layer: Any, r0: float) -> None:
        super().__init__()
        self.groups, self.scaling, self.r0 = layer.groups, layer.scaling, r0
        ranks = layer.head_ranks
        self.A = nn.ParameterList(part.clone() for part in torch.split(layer.A.data, ranks))
        self.B = nn.ParameterList(part.clone() for part in torch.split(layer.B.data, ranks, dim=1))
        self.alpha = nn.Parameter(torch.ones(len(ranks), dtype=torch.float64))
        self.tau = 0.0

    def forward(self, x: Tensor) -> Tensor:
        updates = []
        for head, (A, B) in enumerate(zip(self.A, self.B, strict=True)):
            mask = torch.sigmoid((self.r0 * self.alpha[head] - torch.arange(len(A)) - 0.5) / self.tau)
            own = x
            if self.groups is not None and self.groups.kind == "columns":
                own = x[..., self.groups.span(head)]
            updates.append((own @ A.T * mask) @ B.T)
        if self.groups is not None and self.groups.kind == "rows":
            return self.scaling * torch.cat(updates, dim=-1)
        return self.scaling * sum(updates)


def loss_of(model: nn.Module, seed: int) -> Tensor:
    """Cross-entropy in float64: transformers' own would round to float32."""
    ids = token_batch(seed=seed)["input_ids"]
    logits = model(input_ids=ids).logits[:, :-1]
    return nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


@pytest.mark.parametrize(
    "settings", [{}, {"tv": 0.0}, {"l1_term": False, "tv": 5.0}, {"l1": 0.0}], ids=["both", "l1", "tv", "none"]
)
def test_alpha_is_that_of_a_twin_with_every_head_in_the_graph(settings: dict[str, Any]) -> None:
    """60 steps in float64: our closed forms against autograd through the masks and through the penalty."""
    lora = {"r": 3, "target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True, "random_B": False}
    model = adapted(tiny_gpt2(), **lora).double().eval()
    optimizer = adamw(model, lr=1e-3)
    # λ is about as large as the task's gradients of α, so that neither hides the other
    ard = ARDLoRA(**{"l1": 1e-3, "alpha_lr": 2e-3, "resize_every": 1000, **settings})
    ranks = lorank.attach(model, optimizer, ard, total_steps=STEPS)
    layers, alphas = ranks.layers, ranks.state["alpha"]

    base = tiny_gpt2().double().eval().requires_grad_(False)
    twins = {name: TwinHeads(layer, 3.0) for name, layer in layers.items()}
    for name, twin in twins.items():
        base.get_submodule(name).register_forward_hook(lambda _, args, out, twin=twin: out + twin(args[0]))
    weights = [p for twin in twins.values() for p in [*twin.A, *twin.B]]
    own = [twin.alpha for twin in twins.values()]
    theta, meta = torch.optim.AdamW(weights, lr=1e-3), torch.optim.Adam(own, lr=ard.alpha_lr)
    previous = [alpha.detach().clone() for alpha in own]

    for step in range(STEPS - 1):
        ours = loss_of(model, step)
        ours.backward()
        optimizer.step()
        optimizer.zero_grad()

        for twin in twins.values():
            twin.tau = temperature(step, STEPS, ard.tau_start, ard.tau_end)
        task = loss_of(base, step)
        penalty = sum(
            float(ard.l1_term) * alpha.abs().sum() + ard.tv * ((alpha - before) ** 2).sum()
            for alpha, before in zip(own, previous, strict=True)
        )
        (task + ard.l1 * penalty).backward()
        previous = [alpha.detach().clone() for alpha in own]
        for twin_optimizer in (theta, meta):
            twin_optimizer.step()
            twin_optimizer.zero_grad()
        with torch.no_grad():
            for alpha in own:
                alpha.clamp_(min=0)
        torch.testing.assert_close(ours, task, rtol=1e-10, atol=0)
        torch.testing.assert_close(alphas, torch.cat([alpha.detach() for alpha in own]), rtol=1e-10, atol=1e-10)
    assert float((alphas - 1).abs().max()) > 0.02
    for name, layer in layers.items():
        torch.testing.assert_close(layer.A.data, torch.cat(list(twins[name].A)), rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(layer.B.data, torch.cat(list(twins[name].B), dim=1), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("heads", ["auto", "module"])
@pytest.mark.parametrize("stop", [3, 6])
def test_resumed_bitwise_across_resizes(heads: Any, stop: int) -> None:
    same_run(ARDLoRA(**FAST, heads=heads, budget="60%" if heads == "module" else "12000 params"), stop)


def test_resumed_from_a_model_that_was_loaded_before() -> None:
    """As the Trainer does it: weights and optimiser first, then the callback."""
    ard = ARDLoRA(**FAST)
    whole, straight = run_loop(ard, 10, lora_dropout=0.0)
    part, first = run_loop(ard, 10, until=5, lora_dropout=0.0)
    model = adapted(tiny_llama(), random_B=False)
    optimizer = adamw(model)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, 10)
    handle = lorank.lora.resize_on_load(find_layers(model))
    made = dict.fromkeys(part.layers, 4)
    model.load_state_dict(part.saved["model"], strict=False)
    handle.remove()
    optimizer.load_state_dict(part.saved["optimizer"])
    schedule.load_state_dict(part.saved["schedule"])
    ranks = lorank.training.Ranks(find_layers(model), optimizer, ard, TrainingInfo(10, seed=3), initial_ranks=made)
    losses = []
    for step in range(ranks.step, 10):
        loss = model(**token_batch(seed=step)).loss
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert first + losses == straight
    assert ranks.layers.ranks == whole.layers.ranks


def test_checkpoints_and_the_result_are_plain_peft(tmp_path: Path) -> None:
    ids = {"input_ids": token_batch(seed=50)["input_ids"]}

    def reloaded_logits(folder: Path) -> Tensor:
        return PeftModel.from_pretrained(tiny_llama(), folder).eval()(**ids).logits

    for until in (6, 10):
        ranks, _ = run_loop(ARDLoRA(**FAST), 10, until=until)
        model = ranks.layers.model.eval()
        assert (ranks.layers.gates is None) == (until == 10)
        model.save_pretrained(tmp_path / str(until))
        with torch.no_grad():
            torch.testing.assert_close(
                reloaded_logits(tmp_path / str(until)), model(**ids).logits, rtol=1e-5, atol=1e-6
            )
    assert not any(layer.module.lora_variant for layer in ranks.layers.values())


def test_the_last_resize_rounds_every_head() -> None:
    ranks, _ = run_loop(ARDLoRA(**FAST), 10)
    record = ranks.history[-1]
    assert record.details["final"]
    alpha = ranks.state["alpha"]
    expected = torch.floor(ranks.state["r0"] * alpha + 0.5).clamp(min=1)
    found = [rank for ranks_of in record.details["head_ranks"].values() for rank in ranks_of]
    assert found == expected.long().tolist()
    assert {name: sum(some) for name, some in record.details["head_ranks"].items()} == ranks.layers.ranks
    assert sum(found) < 30 * 4  # λ has taken some of the 30 groups' four ranks


@pytest.mark.parametrize(
    ("budget", "settings"),
    [
        ("2000 params", {}),
        ("7.5%", {}),
        ("40 ranks", {}),
        (3, {}),
        ({"bytes": 18000}, {}),
        ({"parameters": 2600, "max_lora_rank": 5}, {}),
        ("300 params", {"min_rank": 0}),
        ("1200 params", {"heads": "module"}),
        ("2000 params", {"l1_term": False}),
    ],
)
def test_a_run_ends_at_or_under_its_budget(budget: Any, settings: dict[str, Any]) -> None:
    """λ is given no time to help: the last resize alone must hold the budget, and use what it can."""
    ranks, _ = run_loop(ARDLoRA(budget=budget, alpha_lr=1e-3, resize_every=3, **settings), 10)
    resolved, found = ranks.budget, ranks.layers.ranks
    assert resolved.fits(found)
    for name, heads in ranks.history[-1].details["head_ranks"].items():
        assert sum(heads) == found[name]
        assert min(heads) >= settings.get("min_rank", 1)
    if "max_lora_rank" not in str(budget):
        spare = [1 - use["used"] / use["limit"] for use in resolved.used(found).values()]
        assert min(spare) < 0.3  # one rank of the FFN is the most that may be left over in the smallest of these


def test_lambda_follows_the_budget() -> None:
    """With time to learn, the soft ranks themselves come near the budget, whatever λ begins with."""
    for l1 in (1e-4, 1e-1):
        ard = ARDLoRA(budget="2500 params", l1=l1, alpha_lr=0.01, resize_every=10)
        ranks, _ = run_loop(ard, 150, until=149)
        state = ranks.state
        use = float((state["budget.costs"] @ (state["r0"] * state["alpha"])).max() / state["budget.limits"][0])
        assert 0.8 < use < 1.15
        assert float(state["budget.first"]) > 1.8


def test_without_a_penalty_ranks_may_grow() -> None:
    """λ = 0: what the task wants. With head room, the masks of the last ranks pull α up."""
    ard = ARDLoRA(l1=0.0, alpha_lr=0.05, resize_every=2, hold=1, r0=2, tau_start=0.15)
    ranks, _ = run_loop(ard, 60, until=59)
    assert set(ranks.history[0].ranks.values()) == {2, 4, 8}  # two for each head or module
    assert max(max(layer.head_ranks) for layer in ranks.layers.values()) > 2
    assert float(ranks.state["alpha"].max()) > 1.2


def test_heads_of_the_module_kind_stay_plain() -> None:
    ranks, _ = run_loop(ARDLoRA(**FAST, heads="module"), 10, until=4)
    assert all(layer.groups is None for layer in ranks.layers.values())
    assert len(ranks.state["alpha"]) == len(ranks.layers)


def test_heads_can_be_said() -> None:
    overrides = {"q_proj": HeadGroups("rows", 2, 16), "o_proj": None}
    ranks, _ = run_loop(ARDLoRA(**FAST, head_overrides=overrides), 10, until=1)
    sizes = {name.rsplit(".", 1)[-1]: len(layer.head_ranks) for name, layer in ranks.layers.items()}
    assert sizes == {"q_proj": 2, "k_proj": 2, "v_proj": 2, "o_proj": 1, "gate_proj": 1, "up_proj": 1, "down_proj": 1}


def test_no_two_ranks_begin_alike() -> None:
    """Ranks that the form brings, and those that are stored beyond r0, are drawn apart."""
    ranks, _ = run_loop(ARDLoRA(r0=3), 10, until=0)
    for layer in ranks.layers.values():
        assert layer.rank == 4 * len(layer.head_ranks)
        assert len(layer.A.detach().unique(dim=0)) == layer.rank


def test_hysteresis_and_the_interval_hold_ranks_back() -> None:
    """The same α, resized rarely or only after a hold: fewer allocations, and never between intervals."""
    often, _ = run_loop(ARDLoRA(**{**FAST, "resize_every": 1}), 12)
    rarely, _ = run_loop(ARDLoRA(**{**FAST, "resize_every": 5}), 12)
    held, _ = run_loop(ARDLoRA(**{**FAST, "resize_every": 1, "hold": 100}), 12)
    steps = [[record.step for record in run.history.allocations] for run in (often, rarely, held)]
    assert len(steps[0]) > 2
    assert set(steps[1]) <= {5, 10, 12}
    assert steps[2] == [12]


def test_a_slow_alpha_is_said(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "lorank")
    run_loop(ARDLoRA(resize_every=2, alpha_lr=5e-5), 5, until=1)
    assert "will not move a single rank" in caplog.text
    assert "by default it is 0.4 in this run" in caplog.text
    caplog.clear()
    run_loop(ARDLoRA(resize_every=2), 5, until=1)
    assert "single rank" not in caplog.text


def test_the_durations_are_fractions_of_the_run() -> None:
    allocator = ARDLoRA()
    assert allocator.schedule(TrainingInfo(1000))[:3] == [20, 40, 60]
    assert allocator.schedule(TrainingInfo(50))[:3] == [1, 2, 3]
    assert ARDLoRA(resize_every=20).schedule(TrainingInfo(50)) == [20, 40]


def test_in_a_short_run_alpha_follows_the_same_path_as_with_the_rate_it_stands_for() -> None:
    default, _ = run_loop(ARDLoRA(**{**FAST, "alpha_lr": None}), 10, until=4)
    named, _ = run_loop(ARDLoRA(**{**FAST, "alpha_lr": 2 / 10}), 10, until=4)
    torch.testing.assert_close(default.state["alpha"], named.state["alpha"], rtol=0, atol=0)
    assert float((1 - default.state["alpha"]).abs().max()) > 0.3  # four steps of 0.2 each, at most


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"r0": 0}, "r0=0"),
        ({"heads": "all"}, "expected one of auto, module"),
        ({"l1": -1.0}, "l1=-1"),
        ({"tv": float("inf")}, "tv=inf"),
        ({"alpha_lr": 0.0}, "alpha_lr=0"),
        ({"tau_end": 0.6}, "at most tau_start=0.5"),
        ({"epsilon": 0.5}, "below 0.5"),
        ({"resize_every": 0}, "resize_every=0"),
        ({"hold": 0}, "hold=0"),
        ({"min_rank": -1}, "min_rank=-1"),
        ({"gain": 0.0}, "gain=0"),
        ({"reach": 1.5}, "reach=1.5"),
        ({"l1": 0.0, "budget": 8}, "would stay 0"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ScheduleError, match=said):
        ARDLoRA(**settings)


@pytest.mark.parametrize(
    ("settings", "lora", "error", "said"),
    [
        ({"r0": 9}, {}, ScheduleError, "can hold at most 8 ranks"),
        ({"budget": "1000 params"}, {}, BudgetError, "cannot hold min_rank=1 for each of the 30 groups"),
        ({}, {"random_B": True}, AdapterError, "heads='module'"),
        ({}, {"use_dora": True}, AdapterError, "heads='module'"),
        ({"min_rank": 0, "heads": "module"}, {"use_dora": True}, ScheduleError, "DoRA needs a rank"),
    ],
)
def test_what_does_not_fit_the_model_is_refused(settings: Any, lora: Any, error: Any, said: str) -> None:
    with pytest.raises(error, match=said):
        run_loop(ARDLoRA(alpha_lr=0.1, **settings), 10, until=1, **lora)


def test_no_group_left_leaves_one_rank() -> None:
    ranks, _ = run_loop(ARDLoRA(**{**FAST, "alpha_lr": 0.5, "l1": 10.0, "min_rank": 0}), 10)
    assert ranks.layers.total_rank == 1


def test_settled_ranks_stay_and_their_weights_train_on() -> None:
    """After the last resize α and the masks stand still, within the budget, and A and B go on."""
    ard = ARDLoRA(**FAST, min_rank=0, heads="module", budget="40 ranks", reach=0.4, settle=0.5)
    stopped, _ = run_loop(ard, 20, until=10, r=4)
    whole, _ = run_loop(ard, 20, r=4)
    assert sum(stopped.layers.ranks.values()) <= 40
    assert whole.layers.ranks == stopped.layers.ranks
    assert torch.equal(whole.state["alpha"], stopped.state["alpha"])
    assert all(record.step in (10, 20) or record.step < 10 for record in whole.history.allocations)
    name = next(name for name, layer in whole.layers.items() if layer.rank)
    assert not torch.equal(whole.layers[name].A, stopped.layers[name].A)


@pytest.mark.parametrize("stop", [6, 14], ids=["before it settles", "after it has settled"])
def test_a_run_that_settles_early_is_resumed_bitwise(stop: int) -> None:
    same_run(ARDLoRA(**FAST, heads="module", budget="40 ranks", reach=0.4, settle=0.5), stop, 20, r=4)


GROWING: dict[str, Any] = {"l1": 0.0, "alpha_lr": 0.05, "resize_every": 2, "hold": 1, "r0": 2, "tau_start": 0.15}
"""Settings under which ranks enter within 60 steps."""


def test_entering_ranks_begin_along_the_residual_gradient_of_their_head(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows of A that a plan brings, against singular vectors of blocks of G, which autograd forms."""
    checked: set[str] = set()
    original = allocator.with_directions

    def compare(context: Context, plan: Plan) -> Plan:
        found = original(context, plan)
        for name, change in found.items():
            if not change.add:
                continue
            layer = context.layers[name]
            weight = layer.module.get_base_layer().weight.requires_grad_(True)
            training = context.model.training
            with torch.enable_grad():
                (G,) = torch.autograd.grad(context.model.eval()(**context.validation_batch).loss, [weight])
            context.model.train(training)
            weight.requires_grad_(False)
            heads = change.head_ranks or (change.rank,)
            owners = [head for head, rank in enumerate(heads) for _ in range(rank)]
            new = [head for head, origin in zip(owners, change.origins, strict=True) if origin < 0]
            assert change.vectors is not None
            for head in set(new):
                rows = change.vectors.values[[i for i, owner in enumerate(new) if owner == head]].double()
                A = torch.split(layer.A.detach().double(), list(layer.head_ranks))[head]
                block = G.double()
                if layer.groups is not None:
                    own = layer.groups.span(head)
                    block = block[own] if layer.groups.kind == "rows" else block[:, own]
                    checked.add(layer.groups.kind)
                residual = block - block @ torch.linalg.pinv(A) @ A
                values = torch.linalg.svdvals(residual)
                reached = (residual @ rows.T).norm(dim=0) / rows.norm(dim=1)
                torch.testing.assert_close(reached, values[: len(rows)], rtol=1e-3, atol=1e-4 * float(values[0]))
                assert float((A @ rows.T).abs().max()) < 1e-5
        return found

    monkeypatch.setattr(allocator, "with_directions", compare)
    method = ARDLoRA(**GROWING, new_ranks="gradient", second_moments="mean")
    assert method.needs_validation_batch
    run_loop(method, 60, until=59)
    assert checked == {"rows", "columns"}


def test_second_moments_of_entering_ranks_are_filled() -> None:
    least = {}
    for second_moments in ("zero", "mean"):
        ranks, _ = run_loop(ARDLoRA(**GROWING, second_moments=second_moments), 60, until=0)
        model, seen = ranks.layers.model, []
        for step in range(59):
            before = ranks.layers.ranks
            model(**token_batch(seed=step)).loss.backward()
            ranks.optimizer.step()
            ranks.optimizer.zero_grad()
            for name, layer in ranks.layers.items():
                if layer.rank > before[name]:
                    # a row of second moments that is zero belongs to a rank that has had no gradient
                    moments = ranks.optimizer.state[layer.A]["exp_avg_sq"]
                    seen.append(int((moments.flatten(1).amax(1) == 0).sum()))
        assert seen
        least[second_moments] = max(seen)
        ranks.detach()
    assert least["zero"] > 0
    assert least["mean"] == 0


def test_a_resumed_run_with_options_is_the_uninterrupted_one() -> None:
    same_run(ARDLoRA(**GROWING, new_ranks="gradient", second_moments="mean"), 15, 30)


def test_directions_need_data() -> None:
    model = adapted(tiny_llama(), random_B=False)
    with pytest.raises(ValidationBatchError, match="validation_batch"):
        lorank.attach(model, adamw(model), ARDLoRA(new_ranks="gradient"), total_steps=10)
