"""Any loop that calls optimizer.step() allocates, and a loop that is resumed goes on bitwise."""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator

import lorank
from lorank.allocators import Allocation, Allocator, Context, State, TrainingInfo
from lorank.errors import AdapterError, OptimizerStateError, ResumeError, ScheduleError, ValidationBatchError
from lorank.lora import LayerPlan
from tests.models import adapted, tiny_bert, tiny_llama, token_batch

QUICK = lorank.ALoRA(k1=2, k2=2, rounds=3, unit="steps", per_round=6, scores="exact")


def adamw(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, fused=True)


def test_a_five_line_loop_allocates() -> None:
    model, data = adapted(tiny_llama(), lora_dropout=0.1), [token_batch(seed=seed) for seed in range(8)]
    optimizer = adamw(model)
    ranks = lorank.attach(model, optimizer, QUICK, validation_batch=token_batch(seed=99), total_steps=8)
    for batch in data:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert [record.step for record in ranks.history] == [0, 2, 4, 6]
    assert len(set(ranks.layers.ranks.values())) > 1
    assert ranks.layers.total_rank <= 14 * 4
    for before, record in zip(ranks.history, ranks.history.allocations, strict=False):
        assert sum(map(len, record.pruned.values())) == 6
        for name, rank in record.ranks.items():
            change = record.added.get(name, 0) - len(record.pruned.get(name, []))
            assert rank == before.ranks[name] + change
            assert len(record.scores[name]) == before.ranks[name]
        assert record.details["engine"] == "exact"
        assert record.parameters == sum(record.ranks[n] * sum(record.shapes[n]) for n in record.ranks)


def test_allocation_leaves_the_output_as_pruning_alone_does() -> None:
    """New ranks have B = 0: the loss moves by what was pruned, and by nothing else."""
    model = adapted(tiny_llama()).double().eval()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    ranks = lorank.attach(
        model, optimizer, lorank.ALoRA(k1=1, unit="steps"), validation_batch=token_batch(), total_steps=3
    )
    twin = adapted(tiny_llama()).double().eval()
    model(**token_batch()).loss.backward()
    optimizer.step()
    layers = lorank.find_layers(twin)
    for name, gone in ranks.history[1].pruned.items():
        layers[name].B.data[:, list(gone)] = 0
    with torch.no_grad():
        torch.testing.assert_close(model(**token_batch()).loss, twin(**token_batch()).loss, rtol=1e-10, atol=0)


def test_accelerates_wrapped_optimiser_allocates() -> None:
    accelerator = Accelerator(cpu=True)
    model = adapted(tiny_llama())
    model, optimizer = accelerator.prepare(model, adamw(model))
    ranks = lorank.attach(model, optimizer, QUICK, validation_batch=token_batch(), total_steps=4)
    for seed in range(4):
        accelerator.backward(model(**token_batch(seed=seed)).loss)
        optimizer.step()
        optimizer.zero_grad()
    assert [record.step for record in ranks.history] == [0, 2]


def test_the_users_own_loss_and_scheduler_and_clipping() -> None:
    model = adapted(tiny_llama())
    optimizer = adamw(model)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=4)

    def my_loss(model: torch.nn.Module, batch: Any) -> torch.Tensor:
        return model(input_ids=batch["input_ids"]).logits.pow(2).mean()

    ranks = lorank.attach(
        model,
        optimizer,
        QUICK,
        validation_batch={"input_ids": token_batch()["input_ids"]},
        total_steps=4,
        loss_fn=my_loss,
    )
    for seed in range(4):
        my_loss(model, token_batch(seed=seed)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    assert ranks.history[1].details["engine"] == "reference"
    assert ranks.history[1].details["notice"]


@dataclass(frozen=True)
class Watcher(Allocator):
    """Records what each hook saw, and resizes at step 2: the frame that other methods will stand in."""

    def start(self, layers: Any, run: TrainingInfo) -> State:
        return {"gradients": torch.zeros(1), "moved": torch.zeros(1)}

    def due(self, step: int, run: TrainingInfo) -> bool:
        return step == 2

    def before_step(self, context: Context, state: State) -> None:
        state["gradients"] += sum(layer.B.grad.abs().sum() for layer in context.layers.values())
        state["before"] = torch.cat([layer.B.detach().flatten() for layer in context.layers.values()])

    def after_step(self, context: Context, state: State) -> None:
        after = torch.cat([layer.B.detach().flatten() for layer in context.layers.values()])
        state["moved"] += (after - state["before"]).abs().sum()

    def allocate(self, context: Context, state: State) -> Allocation | None:
        return Allocation({name: LayerPlan((0,), 1) for name in context.layers})


def test_hooks_see_gradients_before_and_weights_after_the_step_and_state_is_saved() -> None:
    model = adapted(tiny_llama())
    optimizer = adamw(model)
    ranks = lorank.attach(model, optimizer, Watcher(), total_steps=3)
    for seed in range(3):
        model(**token_batch(seed=seed)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert ranks.state["gradients"] > 0
    assert ranks.state["moved"] > 0
    assert set(ranks.layers.ranks.values()) == {2}
    assert torch.equal(ranks.state_dict()["state"]["moved"], ranks.state["moved"])


# Resume: a loop that keeps weights and optimiser has kept everything.


def run_loop(steps: range, checkpoint: dict[str, Any] | None, stop: int | None) -> tuple[list[float], Any, Any]:
    torch.manual_seed(5)
    model = adapted(tiny_llama(), random_B=False, lora_dropout=0.1)
    optimizer = adamw(model)
    ranks = lorank.attach(model, optimizer, QUICK, validation_batch=token_batch(seed=99), total_steps=10, seed=3)
    losses = []
    if checkpoint:
        model.load_state_dict(checkpoint["model"], strict=False)
        optimizer.load_state_dict(checkpoint["optimizer"])
        torch.set_rng_state(checkpoint["rng"])
    for step in steps:
        loss = model(**token_batch(seed=step)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        if step + 1 == stop:
            weights = {key: value for key, value in model.state_dict().items() if "lora_" in key}
            saved = {"model": weights, "optimizer": optimizer.state_dict(), "rng": torch.get_rng_state()}
            return losses, ranks, saved
    return losses, ranks, None


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


def test_the_optimiser_may_be_loaded_before_the_weights_and_before_attach() -> None:
    straight, _, _ = run_loop(range(10), None, None)
    first, _, saved = run_loop(range(10), None, 5)
    model = adapted(tiny_llama(), random_B=False, lora_dropout=0.1)
    optimizer = adamw(model)
    optimizer.load_state_dict(saved["optimizer"])
    ranks = lorank.attach(model, optimizer, QUICK, validation_batch=token_batch(seed=99), total_steps=10, seed=3)
    assert ranks.step == 5
    model.load_state_dict(saved["model"], strict=False)
    torch.set_rng_state(saved["rng"])
    losses = []
    for step in range(5, 10):
        loss = model(**token_batch(seed=step)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert first + losses == straight
    assert "lorank" not in optimizer.param_groups[0]


def test_an_optimiser_whose_loading_runs_no_hooks_resumes_at_its_next_step() -> None:
    """bitsandbytes loads its state by code of its own."""
    bitsandbytes = pytest.importorskip("bitsandbytes")

    def make() -> tuple[Any, Any, Any]:
        torch.manual_seed(5)
        model = adapted(tiny_llama(), random_B=False)
        optimizer = bitsandbytes.optim.AdamW8bit([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        options = {"validation_batch": token_batch(seed=99), "total_steps": 10, "seed": 3}
        return model, optimizer, lorank.attach(model, optimizer, QUICK, **options)

    def steps(model: Any, optimizer: Any, count: range) -> list[float]:
        losses = []
        for step in count:
            loss = model(**token_batch(seed=step)).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
        return losses

    model, optimizer, _ = make()
    straight = steps(model, optimizer, range(8))
    model, optimizer, _ = make()
    first = steps(model, optimizer, range(5))
    weights, state = model.state_dict(), optimizer.state_dict()
    model, optimizer, ranks = make()
    model.load_state_dict(weights, strict=False)
    optimizer.load_state_dict(state)
    assert first + steps(model, optimizer, range(5, 8)) == straight
    assert ranks.step == 8


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

    def test_a_state_that_attach_refuses_is_still_in_the_optimiser(self, saved: Any) -> None:
        """Who mends what was wrong goes on from it: nothing begins anew in silence."""
        model = adapted(tiny_llama())
        optimizer = adamw(model)
        optimizer.load_state_dict(saved)
        first = next(iter(optimizer.state.values()))
        whole, first["exp_avg"] = first["exp_avg"], torch.zeros(3, 3)
        settings: dict[str, Any] = {"validation_batch": token_batch(), "total_steps": 10, "seed": 3}
        with pytest.raises(OptimizerStateError, match="exp_avg"):
            lorank.attach(model, optimizer, QUICK, **settings)
        assert "lorank" in optimizer.param_groups[0]
        first["exp_avg"] = whole
        ranks = lorank.attach(model, optimizer, QUICK, **settings)
        assert ranks.step == 3
        assert "lorank" not in optimizer.param_groups[0]


# Bad input, and runs in which nothing happens.


class TestErrors:
    def test_a_method_that_scores_without_a_batch(self) -> None:
        model = adapted(tiny_llama())
        with pytest.raises(ValidationBatchError, match=r"ALoRA scores ranks on a fixed batch .* none was given"):
            lorank.attach(model, adamw(model), QUICK, total_steps=10)

    def test_a_batch_that_cannot_be_scored_on_is_found_before_training(self) -> None:
        model = adapted(tiny_llama())
        batch = token_batch()
        for broken, message in (
            ({"input_ids": batch["input_ids"]}, "labels"),
            ({**batch, "labels": torch.full_like(batch["labels"], -100)}, "all 40 labels"),
            ({**batch, "labels": batch["labels"][:0]}, "no sample"),
        ):
            with pytest.raises(ValidationBatchError, match=message):
                lorank.attach(model, adamw(model), QUICK, validation_batch=broken, total_steps=10)

    def test_a_loss_that_is_not_finite(self) -> None:
        model = adapted(tiny_llama())
        list(lorank.find_layers(model).values())[-1].B.data.fill_(float("nan"))  # some kernels of attention swallow one
        with pytest.raises(ValidationBatchError, match="the loss of the model on the validation batch is nan"):
            lorank.attach(model, adamw(model), QUICK, validation_batch=token_batch(), total_steps=10)

    def test_a_loss_that_becomes_infinite_while_training_moves_no_rank(self) -> None:
        model = adapted(tiny_llama())
        optimizer = adamw(model)
        ranks = lorank.attach(model, optimizer, QUICK, validation_batch=token_batch(), total_steps=10)
        optimizer.step()
        model.get_base_model().model.norm.weight.data.fill_(float("nan"))
        with pytest.raises(ValidationBatchError, match=r"step 2: .* is nan"):
            optimizer.step()
        assert set(ranks.layers.ranks.values()) == {4}

    def test_an_optimiser_state_of_other_ranks_is_refused_when_it_is_loaded(self) -> None:
        model, other = adapted(tiny_llama()), adapted(tiny_llama(), r=6)
        optimizer, foreign = adamw(model), adamw(other)
        other(**token_batch()).loss.backward()
        foreign.step()
        lorank.attach(model, optimizer, QUICK, validation_batch=token_batch(), total_steps=10)
        with pytest.raises(OptimizerStateError, match=r"'exp_avg' of .*q_proj.lora_A has shape \(6, 32\)"):
            optimizer.load_state_dict(foreign.state_dict())

    def test_an_optimiser_of_something_else(self) -> None:
        model, other = adapted(tiny_llama()), adapted(tiny_llama())
        with pytest.raises(OptimizerStateError, match="does not hold the LoRA parameters"):
            lorank.attach(model, adamw(other), QUICK, validation_batch=token_batch(), total_steps=10)

    def test_a_model_without_an_adapter(self) -> None:
        model = tiny_bert()
        with pytest.raises(AdapterError, match="no LoRA layer found"):
            lorank.attach(model, torch.optim.SGD(model.parameters()), QUICK, validation_batch={}, total_steps=10)

    def test_deepspeed(self) -> None:
        model = adapted(tiny_llama())
        optimizer = adamw(model)
        optimizer.__class__ = type(
            "DeepSpeedZeroOptimizer", (type(optimizer),), {"__module__": "deepspeed.runtime.zero"}
        )
        with pytest.raises(lorank.LorankError, match=r"call lorank.reserve_\(model"):
            lorank.attach(model, optimizer, QUICK, validation_batch=token_batch(), total_steps=10)

    def test_no_steps(self) -> None:
        model = adapted(tiny_llama())
        with pytest.raises(ScheduleError, match="total_steps=0"):
            lorank.attach(model, adamw(model), lorank.StaticLoRA(), total_steps=0)

    def test_a_budget_that_one_round_would_use_up(self) -> None:
        model = adapted(tiny_llama(), r=1)
        with pytest.raises(ScheduleError, match="would prune n_A = 14"):
            lorank.attach(model, adamw(model), lorank.ALoRA(), validation_batch=token_batch(), total_steps=10)


@pytest.fixture
def messages() -> Iterator[list[str]]:
    """What lorank warns of during this test alone."""
    gc.collect()  # runs that other tests dropped have had their last word
    heard: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: heard.append(record.getMessage())  # type: ignore[method-assign]  # a sink
    logging.getLogger("lorank").addHandler(handler)
    yield heard
    logging.getLogger("lorank").removeHandler(handler)


def test_a_schedule_without_allocations_is_warned_of_at_once(messages: list[str]) -> None:
    model = adapted(tiny_llama())
    ranks = lorank.attach(
        model, adamw(model), lorank.ALoRA(), validation_batch=token_batch(), total_steps=10, steps_per_epoch=100
    )
    assert "will not move a single rank" in messages[0]
    ranks.detach()
    assert "ended without a single allocation: none was due in 10 steps. No rank was changed." in messages[1]


def test_a_run_without_allocation_warns_even_if_it_is_never_ended(messages: list[str]) -> None:
    model = adapted(tiny_llama())
    optimizer = adamw(model)
    lorank.attach(model, optimizer, QUICK, validation_batch=token_batch(), total_steps=10)
    del optimizer, model
    gc.collect()
    assert "the first was due after step 2 of 10, and training stopped before it" in messages[0]


def test_plain_lora_does_not_warn(messages: list[str]) -> None:
    model = adapted(tiny_llama())
    lorank.attach(model, adamw(model), lorank.StaticLoRA(), total_steps=10).detach()
    assert not messages


def test_detach_removes_every_hook() -> None:
    model = adapted(tiny_llama())
    optimizer = adamw(model)
    ranks = lorank.attach(model, optimizer, QUICK, validation_batch=token_batch(), total_steps=10)
    ranks.detach()
    for seed in range(3):
        model(**token_batch(seed=seed)).loss.backward()
        optimizer.step()
    assert ranks.step == 0
    assert "lorank" not in optimizer.state_dict()["param_groups"][0]
