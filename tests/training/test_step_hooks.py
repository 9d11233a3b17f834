"""``optimizer.step(closure)`` gives what the same run gives without a closure, or is refused in the first step."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import lorank
from lorank.errors import NonFiniteError, OptimizerStateError
from tests.elsewhere import Case, reload
from tests.methods import METHODS
from tests.models import adapted, tiny_llama, token_batch

STEPS = 12
Step = Callable[[torch.optim.Optimizer, Callable[[], Any]], Any]


def without_closure(optimizer: torch.optim.Optimizer, closure: Callable[[], Any]) -> Any:
    loss = closure()
    optimizer.step()
    return loss


WITH_CLOSURE: dict[str, Step] = {
    "positional": lambda optimizer, closure: optimizer.step(closure),
    "keyword": lambda optimizer, closure: optimizer.step(closure=closure),
}


class Subclass(torch.optim.AdamW):
    """An optimiser whose step calls the step of its base class, which has hooks of its own."""

    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


class Run:
    def __init__(self, method: str = "adalora", make: Any = torch.optim.AdamW, **settings: Any) -> None:
        self.model = adapted(tiny_llama(), random_B=method != "ard-heads", lora_dropout=0.1)
        self.model.train()
        self.optimizer = make([p for p in self.model.parameters() if p.requires_grad], lr=1e-2, **settings)
        self.ranks = lorank.attach(
            self.model, self.optimizer, METHODS[method].make(), validation_batch=token_batch(seed=99), total_steps=STEPS
        )

    def train(self, step: Step, steps: int = STEPS) -> list[float]:
        torch.manual_seed(7)
        return [self.train_step(step, i) for i in range(steps)]

    def train_step(self, step: Step, index: int, scale: float = 1.0) -> float:
        def closure() -> torch.Tensor:
            self.optimizer.zero_grad()
            loss = self.model(**token_batch(seed=index % 3)).loss * scale
            loss.backward()
            return loss

        return float(step(self.optimizer, closure).detach())

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: p.detach().clone() for name, p in self.model.named_parameters() if p.requires_grad}


def assert_same(run: Run, expected: Run) -> None:
    assert run.ranks.step == expected.ranks.step
    assert run.ranks.layers.ranks == expected.ranks.layers.ranks
    torch.testing.assert_close(run.weights(), expected.weights(), rtol=0, atol=0)
    for own, other in zip(run.optimizer.state.values(), expected.optimizer.state.values(), strict=True):
        torch.testing.assert_close(own, other, rtol=0, atol=0)
    torch.testing.assert_close(run.ranks.state, expected.ranks.state, rtol=0, atol=0)


@pytest.mark.parametrize("form", WITH_CLOSURE)
@pytest.mark.parametrize("method", ["adalora", "alora-sensi", "sora", "ard", "ard-heads", "alora-dnas", "balanced"])
def test_a_closure_changes_nothing(method: str, form: str) -> None:
    """Losses, ranks, weights, moments and the method's state are bitwise equal."""
    run, expected = Run(method), Run(method)
    assert run.train(WITH_CLOSURE[form]) == expected.train(without_closure)
    assert_same(run, expected)


def test_the_adapter_of_a_run_with_closures_is_the_same_in_a_new_process(tmp_path: Path) -> None:
    cases = []
    for name, step in {"closure": WITH_CLOSURE["positional"], "plain": without_closure}.items():
        run = Run()
        run.train(step)
        lorank.save_adapter(run.ranks.layers, tmp_path / name)
        out = str(tmp_path / f"{name}-logits")
        cases.append(Case(str(tmp_path / "base"), str(tmp_path / name), str(tmp_path / "batch"), out))
    tiny_llama().save_pretrained(tmp_path / "base")
    torch.save(token_batch(seed=5), tmp_path / "batch")
    closure, plain = (found["logits"] for found in reload(cases, tmp_path))
    assert torch.equal(closure, plain)
    with torch.no_grad():
        torch.testing.assert_close(run.model.eval()(**token_batch(seed=5)).logits, plain, rtol=1e-5, atol=1e-6)


def test_a_nan_gradient_stops_the_step_that_made_it() -> None:
    run = Run("sora")
    run.train(WITH_CLOSURE["positional"], 3)
    before = run.weights()
    with pytest.raises(NonFiniteError, match="step 4: the gradient of"):
        run.train_step(WITH_CLOSURE["positional"], 3, scale=float("nan"))
    torch.testing.assert_close(run.weights(), before, rtol=0, atol=0)


@pytest.mark.parametrize("step", [without_closure, WITH_CLOSURE["positional"]])
def test_a_step_inside_a_step_is_counted_once(step: Step) -> None:
    run, expected = Run(make=Subclass), Run()
    assert run.train(step) == expected.train(without_closure)
    assert_same(run, expected)


@pytest.mark.parametrize("make", [torch.optim.AdamW, Subclass])
def test_a_step_is_counted_after_an_error_in_the_step_before(make: Any) -> None:
    run, expected = Run(make=make), Run()

    def fail() -> None:
        raise MemoryError

    with pytest.raises(MemoryError):
        run.optimizer.step(fail)
    assert run.train(WITH_CLOSURE["positional"]) == expected.train(without_closure)
    assert_same(run, expected)


def test_a_step_that_the_scaler_skips_is_not_counted() -> None:
    """A scaler gives a fused optimiser an overflow flag, and the optimiser then leaves the weights unchanged."""
    run = Run("sora", fused=True)
    run.train(WITH_CLOSURE["positional"], 2)
    before = run.weights()
    run.optimizer.found_inf, run.optimizer.grad_scale = torch.ones(()), torch.ones(())
    run.train_step(WITH_CLOSURE["positional"], 2)
    assert run.ranks.step == 2
    torch.testing.assert_close(run.weights(), before, rtol=0, atol=0)
    run.optimizer.found_inf = run.optimizer.grad_scale = None
    run.train_step(WITH_CLOSURE["positional"], 2)
    assert run.ranks.step == 3


class ClosureFirst(torch.optim.SGD):
    """An optimiser that moves the weights before it calls its closure."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for parameter in self.param_groups[0]["params"]:
            parameter.add_(0.01)
        return super().step(closure)


class Twice(torch.optim.SGD):
    """An optimiser that calls its closure once more at moved weights."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        with torch.enable_grad():
            closure()
        for parameter in self.param_groups[0]["params"]:
            parameter.add_(0.01)
        return super().step(closure)


class Never(torch.optim.SGD):
    """An optimiser that ignores its closure."""

    def step(self, closure: Any = None) -> Any:
        return super().step()


@pytest.mark.parametrize(
    ("make", "fault"),
    [
        (ClosureFirst, "ClosureFirst moves the weights before it calls its closure"),
        (Twice, "Twice calls its closure more than once"),
        (Never, "Never does not call its closure"),
    ],
)
def test_a_closure_whose_gradients_are_not_those_of_the_step_is_refused(make: Any, fault: str) -> None:
    run = Run(make=make)
    without = run.weights()
    with pytest.raises(OptimizerStateError, match=rf"{fault}.*The weights are as before.*loss.backward\(\), optimizer"):
        run.train(WITH_CLOSURE["positional"], 1)
    torch.testing.assert_close(run.weights(), without, rtol=0, atol=0)
    assert run.ranks.step == 0


def test_the_remedy_of_that_message_works() -> None:
    run, expected = Run(make=Never), Run(make=torch.optim.SGD)
    assert run.train(without_closure) == expected.train(without_closure)
    assert_same(run, expected)


def test_a_method_that_moves_no_ranks_may_use_any_closure() -> None:
    model = adapted(tiny_llama())
    optimizer = torch.optim.LBFGS([p for p in model.parameters() if p.requires_grad], max_iter=2)
    ranks = lorank.attach(model, optimizer, lorank.StaticLoRA(), total_steps=2)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = model(**token_batch()).loss
        loss.backward()
        return loss

    losses = [float(optimizer.step(closure).detach()) for _ in range(2)]
    assert losses[1] < losses[0]
    assert ranks.step == 2


def test_loaded_ranks_are_in_place_before_the_closure_computes_gradients() -> None:
    """Also if the optimiser's ``load_state_dict`` ran no hooks."""
    whole = Run("adalora")
    whole.train(WITH_CLOSURE["positional"], 8)
    saved = {name: tensor.clone() for name, tensor in whole.model.state_dict().items() if "lora_" in name}
    optimizer_state = copy.deepcopy(whole.optimizer.state_dict())
    rng = torch.get_rng_state()
    losses = [whole.train_step(WITH_CLOSURE["positional"], i) for i in range(8, STEPS)]
    resumed = Run("adalora")
    resumed.model.load_state_dict(saved, strict=False)
    hooks = dict(resumed.optimizer._optimizer_load_state_dict_post_hooks)
    resumed.optimizer._optimizer_load_state_dict_post_hooks.clear()
    resumed.optimizer.load_state_dict(optimizer_state)
    resumed.optimizer._optimizer_load_state_dict_post_hooks.update(hooks)
    torch.set_rng_state(rng)
    assert [resumed.train_step(WITH_CLOSURE["positional"], i) for i in range(8, STEPS)] == losses
    assert_same(resumed, whole)
