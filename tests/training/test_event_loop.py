"""The event loop: what its hooks see, in which order it does what, and that it leaves nothing behind."""

from __future__ import annotations

import copy
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import lorank
from lorank.allocators import Allocation, Allocator, ALoRA, ALoRASensi, Context, State, TrainingInfo
from lorank.errors import LorankError, OptimizerStateError, ValidationBatchError
from lorank.lora import LayerPlan, find_layers
from lorank.lora.variants.fused import FusedLora
from lorank.training.integrations.base import Integration, Integrations, StepSkipped
from lorank.training.integrations.no_allocation_warning import NoAllocationWarning
from lorank.training.run_state import RunState
from tests.methods import METHODS, STEPS
from tests.models import adapted, tiny_llama, token_batch
from tests.training.integrations.noting import HOOKS, Noting
from tests.training.loops import QUICK, adamw, run_loop

ROUNDS: dict[str, Any] = {"k1": 2, "k2": 5, "rounds": 1, "unit": "steps", "per_round": 4}


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


def test_the_hooks_run_in_the_order_that_the_protocol_names() -> None:
    """In a step in which ranks move, with everything that a real run does in between."""
    notes: list[str] = []
    model = adapted(tiny_llama(), random_B=False).train()
    optimizer = adamw(model)
    ranks = lorank.attach(model, optimizer, ALoRASensi(**ROUNDS), total_steps=10)
    ranks._integrations = Integrations([*ranks._integrations.members, Noting("it", notes)])
    for step in (1, 2):
        notes.clear()
        model(**token_batch(seed=step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert [note.removeprefix("it.") for note in notes] == list(HOOKS[1:-1])


def test_a_skipped_step_is_not_counted() -> None:
    class Skipping(Integration):
        def before_step(self, run: RunState) -> None:
            raise StepSkipped

    model = adapted(tiny_llama(), random_B=False).train()
    optimizer = adamw(model)
    ranks = lorank.attach(model, optimizer, ALoRASensi(**ROUNDS), total_steps=10)
    ranks._integrations = Integrations([Skipping(), *ranks._integrations.members])
    model(**token_batch(seed=1)).loss.backward()
    optimizer.step()
    assert ranks.step == 0
    assert not any(value.any() for value in ranks.state.values())


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


def test_a_state_that_attach_refuses_is_still_in_the_optimiser() -> None:
    """Who mends what was wrong goes on from it: nothing begins anew in silence."""
    saved = run_loop(range(10), None, 3)[2]["optimizer"]
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


def test_a_loss_that_becomes_infinite_while_training_moves_no_rank() -> None:
    model = adapted(tiny_llama())
    optimizer = adamw(model)
    ranks = lorank.attach(model, optimizer, QUICK, validation_batch=token_batch(), total_steps=10)
    optimizer.step()
    model.get_base_model().model.norm.weight.data.fill_(float("nan"))
    with pytest.raises(ValidationBatchError, match=r"step 2: .* is nan"):
        optimizer.step()
    assert set(ranks.layers.ranks.values()) == {4}


def hooks_of(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> list[int]:
    tables = [optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks]
    tables += [optimizer._optimizer_state_dict_post_hooks, optimizer._optimizer_load_state_dict_post_hooks]
    counts = [len(table) for table in tables]
    return counts + [
        sum(len(table(module)) for module in model.modules())
        for table in (lambda m: m._forward_pre_hooks, lambda m: m._load_state_dict_pre_hooks)
    ]


@pytest.mark.parametrize("fails", ["the settings", "an integration"])
def test_a_run_that_cannot_begin_leaves_no_hook_and_no_variant(fails: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted(tiny_llama(), random_B=False).train()
    optimizer = adamw(model)
    before, weights, ranks = hooks_of(model, optimizer), copy.deepcopy(model.state_dict()), find_layers(model).ranks
    allocator: Any = ALoRASensi(**{**ROUNDS, "per_round": 10_000})
    if fails == "an integration":  # the last one, when all others have started
        allocator = ALoRA(**ROUNDS)

        def failing(self: Any, run: RunState) -> None:
            raise LorankError("cannot")

        monkeypatch.setattr(NoAllocationWarning, "on_start", failing)
    with pytest.raises(LorankError):
        lorank.attach(model, optimizer, allocator, validation_batch=token_batch(seed=9), total_steps=10)
    assert hooks_of(model, optimizer) == before
    assert find_layers(model).ranks == ranks
    for name, value in model.state_dict().items():
        assert torch.equal(value, weights[name]), name
    for layer in find_layers(model).values():
        assert layer.gate is None
        assert not isinstance(layer.module.lora_variant.get(layer.adapter), FusedLora)


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


def everything_on(model: torch.nn.Module) -> list[tuple[str, ...]]:
    """What a module can carry beside its weights: hooks, attributes of the instance, its class, PEFT's variants."""
    return [
        (
            name,
            type(module).__qualname__,
            *sorted(vars(module)),
            *(
                f"{kind} {hook}"
                for kind in vars(module)
                if kind.endswith("_hooks")
                for hook in vars(module)[kind].values()
            ),
            *(repr(variant) for variant in getattr(module, "lora_variant", {}).values()),
        )
        for name, module in model.named_modules()
    ]


@pytest.mark.parametrize("method", ["alora", "adalora", "sora", "ard-heads", "balanced"])
def test_after_a_run_only_modules_at_rank_0_carry_anything(method: str) -> None:
    model = adapted(tiny_llama(), random_B=False, **METHODS[method].lora).train()
    before = everything_on(model)
    optimizer = adamw(model)
    ranks = lorank.attach(model, optimizer, METHODS[method].make(), validation_batch=token_batch(), total_steps=STEPS)
    assert everything_on(model) != before
    for seed in range(STEPS):
        model(**token_batch(seed=seed)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    ranks.detach()
    empty = {f"{ranks.layers.prefix}{name}" for name, rank in ranks.layers.ranks.items() if not rank}
    after = everything_on(model)
    assert [one for one in after if one[0] not in empty] == [one for one in before if one[0] not in empty]
    for then, now in zip(before, after, strict=True):
        if then[0] in empty:
            assert len(now) == len(then) + 2  # the hooks that save and load it without its empty tensors


def test_a_model_with_a_run_is_copied_and_pickled_and_the_copies_train_alone(tmp_path: Path) -> None:
    model = adapted(tiny_llama(), random_B=False).train()
    optimizer = adamw(model)
    ranks = lorank.attach(model, optimizer, METHODS["sora"].make(), validation_batch=token_batch(), total_steps=STEPS)
    for seed in range(STEPS - 1):
        model(**token_batch(seed=seed)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert ranks.layers.gates is not None
    assert 0 in ranks.layers.ranks.values()
    torch.save(model, tmp_path / "model.pt")
    torch.save(token_batch(), tmp_path / "batch.pt")
    script = (
        "import torch; torch.set_num_threads(1); model = torch.load('model.pt', weights_only=False).eval()\n"
        "with torch.no_grad(): out = [model(**torch.load('batch.pt')).logits]\n"
        "model.load_state_dict(model.state_dict())\n"  # in a process that has never seen the run
        "with torch.no_grad(): out.append(model(**torch.load('batch.pt')).logits)\n"
        "torch.save(out, 'out.pt')"
    )
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True, capture_output=True)
    found = torch.load(tmp_path / "out.pt")
    model.eval()
    with torch.no_grad():
        expected = model(**token_batch()).logits
        teacher = copy.deepcopy(model)
        model.train()
        for weight in teacher.parameters():
            weight.zero_()
        model.eval()
        assert torch.equal(model(**token_batch()).logits, expected)
    assert torch.allclose(found[0], expected, atol=1e-6)
    assert torch.allclose(found[1], expected, atol=1e-6)
