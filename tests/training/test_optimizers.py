"""Runs with every optimiser: through rank 0 and back, resumed, or refused before any rank moves."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import lorank
from lorank.allocators import Allocation, Allocator, Context, State, TrainingInfo
from lorank.errors import OptimizerStateError
from lorank.lora import LayerPlan
from tests import optimizers
from tests.elsewhere import Case, reload
from tests.models import adapted, tiny_llama, token_batch
from tests.optimizers import ALL, QUANTISED, REFUSED, WithEntry

STEPS = 8
pytestmark = pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")


@dataclass(frozen=True)
class Scripted(Allocator):
    """Moves ranks as written: the first module loses all its ranks and gets some back, the second grows and shrinks."""

    def due(self, step: int, run: TrainingInfo) -> bool:
        return step in (2, 4, 6)

    def allocate(self, context: Context, state: State) -> Allocation:
        first, second = context.layers
        rank = context.layers[second].rank
        return Allocation(
            {
                2: {first: LayerPlan(()), second: LayerPlan(tuple(range(rank)), 2)},
                4: {first: LayerPlan((), 4), second: LayerPlan((1, rank - 1, 0))},
                6: {first: LayerPlan((2, 0)), second: LayerPlan((0, 2), 1)},
            }[context.step]
        )


class Run:
    def __init__(
        self, make: Any, allocator: Allocator | None = None, *, wide: bool = False, random_B: bool = True
    ) -> None:
        torch.manual_seed(5)
        model = tiny_llama(1, **({"hidden_size": 1024, "intermediate_size": 8} if wide else {}))
        self.model = adapted(model, random_B=random_B, target_modules=["q_proj", "v_proj"], lora_dropout=0.1)
        self.model.train()
        self.optimizer = make([p for p in self.model.parameters() if p.requires_grad])
        self.ranks = lorank.attach(
            self.model, self.optimizer, allocator or Scripted(), total_steps=STEPS, validation_batch=token_batch(seed=9)
        )

    def train(self, steps: range = range(STEPS), closure: bool = False) -> list[float]:
        return [self.train_step(step, closure) for step in steps]

    def train_step(self, step: int, closure: bool = False) -> float:
        def compute() -> torch.Tensor:
            self.optimizer.zero_grad()
            loss = self.model(**token_batch(seed=step)).loss
            loss.backward()
            return loss

        if closure:
            return float(self.optimizer.step(compute).detach())
        loss = compute()
        self.optimizer.step()
        return float(loss.detach())

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: p.detach().clone() for name, p in self.model.named_parameters() if p.requires_grad}

    def save(self) -> bytes:
        weights = {key: value for key, value in self.model.state_dict().items() if "lora_" in key}
        buffer = io.BytesIO()
        torch.save((weights, self.optimizer.state_dict(), torch.get_rng_state()), buffer)
        return buffer.getvalue()

    def load(self, saved: bytes) -> None:
        weights, optimizer, rng = torch.load(io.BytesIO(saved), weights_only=False)
        self.model.load_state_dict(weights, strict=False)
        self.optimizer.load_state_dict(optimizer)
        torch.set_rng_state(rng)


@pytest.fixture
def _no_compilation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)  # torchao compiles for each new shape


@pytest.mark.usefixtures("_no_compilation")
@pytest.mark.parametrize("name", [name for name in ALL if name not in REFUSED])
def test_a_run_through_rank_0_goes_on_exactly_from_its_checkpoint(name: str) -> None:
    """Stopped while a module has rank 0, and when it has ranks again: losses, weights and moments are bitwise equal."""
    wide = name in QUANTISED
    whole = Run(ALL[name], wide=wide)
    losses, saved = [], {}
    for step in range(STEPS):
        losses += whole.train(range(step, step + 1))
        if step + 1 in (3, 5):
            saved[step + 1] = whole.save()
    assert torch.tensor(losses).isfinite().all()
    assert list(whole.ranks.layers.ranks.values()) == [2, 3]
    for stop, checkpoint in saved.items():
        resumed = Run(ALL[name], wide=wide)
        resumed.load(checkpoint)
        assert resumed.train(range(stop, STEPS)) == losses[stop:]
        torch.testing.assert_close(resumed.weights(), whole.weights(), rtol=0, atol=0)
        for own, other in zip(resumed.optimizer.state.values(), whole.optimizer.state.values(), strict=True):
            for key, value in own.items():
                if type(value) is torch.Tensor:
                    assert torch.equal(value, other[key]), key
    assert all(weight.isfinite().all() for weight in whole.weights().values())


@pytest.mark.parametrize("closure", [False, True])
def test_no_optimiser_sees_an_empty_parameter(closure: bool) -> None:
    seen: list[tuple[int, int]] = []

    class Watching(optimizers.OwnAdam):
        def step(self, closure: Any = None) -> Any:
            result = closure() if closure else None
            parameters = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
            seen.extend((id(self), parameter.numel()) for parameter in parameters)
            super().step()
            return result

    run = Run(Watching)
    run.train(closure=closure)
    sizes = [size for own, size in seen if own == id(run.optimizer)]
    assert len(sizes) == 4 * STEPS - 2 * 2  # not the two parameters in the two steps with the first module at rank 0
    assert all(sizes)
    expected = Run(optimizers.OwnAdam)
    expected.train()
    torch.testing.assert_close(run.weights(), expected.weights(), rtol=0, atol=0)


UNKNOWN: dict[str, tuple[Any, str]] = {
    "weights in an entry": (
        lambda p: WithEntry(p, lambda weight: weight.detach().clone()),
        "WithEntry, and its state 'entry' of a weight without a gradient is a copy of the weights",
    ),
    "a step size": (lambda p: WithEntry(p, lambda weight: torch.full_like(weight, 1e-2)), "'entry'.*is not zero"),
    "a flat entry": (lambda p: WithEntry(p, lambda weight: torch.zeros(weight.numel())), "'entry' of .* has shape"),
    "an object": (lambda p: WithEntry(p, lambda _: object()), "entries of unknown kinds"),
    "an attribute": (optimizers.Elsewhere, "it keeps tensors in 'momenta'"),
    "an attribute's attribute": (optimizers.InAnObject, "it keeps tensors in 'keeper'"),
    "names": (optimizers.Named, "it keeps no state under the parameter"),
    "made gradients": (optimizers.FillsGradients, "a step with it fails on a copy .*ZeroDivisionError"),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_an_unknown_optimiser_is_refused_after_its_first_step(name: str) -> None:
    make, message = UNKNOWN[name]
    run = Run(make)
    with pytest.raises(OptimizerStateError, match=f"{message}.*Use AdamW"):
        run.train()
    assert run.ranks.step == 0
    assert list(run.ranks.layers.ranks.values()) == [4, 4]


def test_a_copy_of_weights_that_are_still_zero_is_seen() -> None:
    """As in a first step at learning rate 0, in a warm-up."""

    def make(params: Any) -> torch.optim.Optimizer:
        optimizer = WithEntry(params, lambda weight: weight.detach().clone())
        optimizer.param_groups[0]["lr"] = 0.0
        return optimizer

    run = Run(make, random_B=False)
    with pytest.raises(OptimizerStateError, match="is a copy of the weights"):
        run.train()
    assert not any(layer.B.any() for layer in run.ranks.layers.values())


def test_an_optimiser_of_ones_own_is_tried_without_a_trace() -> None:
    """The trial draws no random numbers, and leaves weights, gradients, state and schedules alone."""

    def run(allocator: Allocator) -> tuple[list[float], Run]:
        one = Run(lambda p: optimizers.OwnAdam(p, weight_decay=0.1), allocator)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(one.optimizer, 0.9)  # puts a step on the instance
        losses = []
        for step in range(2):
            losses.append(one.train_step(step))
            scheduler.step()
        return losses, one

    (losses, moving), (expected, still) = run(Scripted()), run(lorank.StaticLoRA())
    assert losses == expected
    moments, others = moving.optimizer.state, still.optimizer.state
    first, second = moving.ranks.layers.values()
    weight, other = second.A, list(still.ranks.layers.values())[1].A
    assert torch.equal(weight[:4], other)
    assert torch.equal(moments[weight]["m"][:4], others[other]["m"])
    assert not moments[weight]["m"][4:].any()
    assert first.rank == 0


WRAPPERS = {
    "SAM": (optimizers.SAM, r"SAM steps another optimiser.*attach\(model, optimizer.base_optimizer"),
    "Lookahead": (
        optimizers.Lookahead,
        "Lookahead steps another.*attribute fast.*Train with the AdamW alone",
    ),
    "Chain": (optimizers.Chain, "Chain steps another optimiser.*Use one optimiser, with parameter groups"),
    "Prodigy": (optimizers.Prodigy, "Prodigy estimates one step size.*Use AdamW"),
    "LBFGS": (torch.optim.LBFGS, "LBFGS keeps one history.*Use AdamW"),
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_what_is_known_is_said_at_attach(name: str) -> None:
    make, message = WRAPPERS[name]
    with pytest.raises(OptimizerStateError, match=message):
        Run(make)
    assert Run(make, lorank.StaticLoRA()).ranks.step == 0  # which moves no ranks, and may use any of them


def test_lora_fa_is_refused_at_attach() -> None:
    from peft.optimizers import create_lorafa_optimizer

    model = adapted(tiny_llama(1), target_modules=["q_proj", "v_proj"])
    optimizer = create_lorafa_optimizer(model, r=4, lora_alpha=8, lr=1e-2)
    with pytest.raises(OptimizerStateError, match="LoraFAOptimizer keeps its state under the names of modules"):
        lorank.attach(model, optimizer, Scripted(), total_steps=STEPS)


def test_the_remedy_for_sam_works() -> None:
    """Attached to the inner optimiser, the run moves ranks as it should, and weights are those of SAM by hand."""
    model = adapted(tiny_llama(1), target_modules=["q_proj", "v_proj"])
    sam = optimizers.SAM([p for p in model.parameters() if p.requires_grad])
    ranks = lorank.attach(model, sam.base_optimizer, Scripted(), total_steps=STEPS)
    for step in range(STEPS):

        def closure(step: int = step) -> torch.Tensor:
            loss = model(**token_batch(seed=step)).loss
            loss.backward()
            return loss

        closure()
        loss = sam.step(closure)
        sam.zero_grad()
        assert torch.isfinite(loss)
    assert list(ranks.layers.ranks.values()) == [2, 3]
    for layer in ranks.layers.values():
        assert sam.base_optimizer.state[layer.A]["exp_avg"].shape == layer.A.shape


def test_the_remedy_for_a_chain_works() -> None:
    run = Run(lambda p: torch.optim.AdamW([{"params": p[::2], "lr": 1e-2}, {"params": p[1::2], "lr": 2e-2}]))
    run.train()
    assert list(run.ranks.layers.ranks.values()) == [2, 3]


def test_weights_in_the_state_follow_ranks_but_not_gates(tmp_path: Path) -> None:
    """After ``optimizer.eval()``, a schedule-free run gives its average x, also for ranks that began in the run."""
    run = Run(optimizers.AdamWScheduleFree)
    run.train()
    beta = 0.9
    expected = {
        name: parameter.detach().lerp(run.optimizer.state[parameter]["z"], 1 - 1 / beta)
        for name, parameter in run.model.named_parameters()
        if parameter.requires_grad
    }
    run.optimizer.eval()
    torch.testing.assert_close(run.weights(), expected, rtol=0, atol=0)
    tiny_llama(1).save_pretrained(tmp_path / "base")
    lorank.save_adapter(run.ranks.layers, tmp_path / "adapter")
    torch.save(token_batch(seed=5), tmp_path / "batch")
    case = Case(*(str(tmp_path / name) for name in ("base", "adapter", "batch", "out")))
    with torch.no_grad():
        logits = run.model.eval()(**token_batch(seed=5)).logits
    torch.testing.assert_close(reload([case], tmp_path)[0]["logits"], logits, rtol=1e-5, atol=1e-6)
    with pytest.raises(OptimizerStateError, match="AdamWScheduleFree keeps copies of the weights, and SoRA changes B"):
        Run(optimizers.AdamWScheduleFree, lorank.SoRA(prune_every=2))


@pytest.mark.parametrize("make", [torch.optim.Adagrad, torch.optim.AdamW])
def test_a_lora_per_head_keeps_a_usable_state(make: Callable[..., torch.optim.Optimizer]) -> None:
    """Adagrad makes its state when it is constructed, and cannot step without it."""
    run = Run(lambda p: make(p, lr=1e-2), lorank.ARDLoRA(), random_B=False)
    assert any(layer.groups is not None for layer in run.ranks.layers.values())
    run.train()
    assert not any(layer.groups is not None for layer in run.ranks.layers.values())
    run.optimizer.step()
    assert all(weight.isfinite().all() for weight in run.weights().values())


def test_a_state_that_an_optimiser_already_has_is_tried_at_attach() -> None:
    model = adapted(tiny_llama(1), target_modules=["q_proj", "v_proj"])
    optimizer = WithEntry([p for p in model.parameters() if p.requires_grad], lambda w: w.detach().clone())
    model(**token_batch()).loss.backward()
    optimizer.step()
    with pytest.raises(OptimizerStateError, match="is a copy of the weights"):
        lorank.attach(model, optimizer, Scripted(), total_steps=STEPS)


class LightningOptimizer:
    """A wrapper as Lightning makes it: it has copies of the attributes of its optimiser, and its class."""

    def __new__(cls, optimizer: torch.optim.Optimizer) -> Any:
        kind = type("Lightning" + type(optimizer).__name__, (LightningOptimizer, type(optimizer)), {})
        return object.__new__(kind)

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        vars(self).update({key: value for key, value in vars(optimizer).items() if key != "step"})
        self._optimizer = optimizer

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        return self._optimizer

    def step(self, closure: Any = None) -> Any:
        return self._optimizer.step(closure=closure)


def test_a_wrapper_that_shares_the_state_of_its_optimiser_is_looked_through() -> None:
    run = Run(lambda p: LightningOptimizer(torch.optim.AdamW(p, lr=1e-2)))
    expected = Run(lambda p: torch.optim.AdamW(p, lr=1e-2))
    torch.manual_seed(1)
    losses = run.train(closure=True)
    torch.manual_seed(1)
    assert losses == expected.train()
    assert type(run.ranks.optimizer) is torch.optim.AdamW
    torch.testing.assert_close(run.weights(), expected.weights(), rtol=0, atol=0)


def test_an_unknown_entry_of_a_known_optimiser_is_refused() -> None:
    """Wrappers keep slow weights in the state of the optimiser inside them."""
    run = Run(lambda p: torch.optim.AdamW(p, lr=1e-2))
    for parameter in run.optimizer.param_groups[0]["params"]:
        run.optimizer.state[parameter]["slow"] = parameter.detach().clone()
        run.optimizer.state[parameter]["step"] = torch.zeros(())
        for key in ("exp_avg", "exp_avg_sq"):
            run.optimizer.state[parameter][key] = torch.zeros_like(parameter)
    with pytest.raises(OptimizerStateError, match="'slow' is not one of this optimiser's own"):
        run.train()
    assert run.ranks.step == 0


def test_an_error_in_the_last_layer_changes_nothing() -> None:
    """Every new tensor is computed before the first is assigned."""
    expected = Run(lambda p: torch.optim.AdamW(p, lr=1e-2), lorank.StaticLoRA())
    expected.train(range(2))
    run = Run(lambda p: torch.optim.AdamW(p, lr=1e-2))
    run.train(range(1))

    class Fragile(torch.Tensor):
        """A tensor that cannot be indexed, as an optimiser's own kind of tensor may be."""

        @classmethod
        def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if "index_select" in str(function):
                raise NotImplementedError("no index_select")
            return super().__torch_function__(function, types, args, kwargs or {})

    layer = list(run.ranks.layers.values())[1]
    state = run.optimizer.state[layer.B]
    state["exp_avg"] = state["exp_avg"].as_subclass(Fragile)
    with pytest.raises(OptimizerStateError, match=r"lora_B in AdamW cannot be resized .*no index_select"):
        run.train(range(1, 2))
    assert list(run.ranks.layers.ranks.values()) == [4, 4]
    assert not run.model.peft_config["default"].rank_pattern
    torch.testing.assert_close(run.weights(), expected.weights(), rtol=0, atol=0)
    for own, other in zip(run.optimizer.state.values(), expected.optimizer.state.values(), strict=True):
        assert all(torch.equal(torch.as_tensor(own[key]), other[key]) for key in other)
