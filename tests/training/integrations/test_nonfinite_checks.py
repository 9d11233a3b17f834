"""Numbers that are none stop the run by name, and leave no trace: in ranks, gates, averages, weights and moments."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import lorank
from lorank.errors import NonFiniteError
from tests.methods import METHODS, STEPS
from tests.models import adapted, tiny_llama, token_batch

ADAPTIVE = [name for name, method in METHODS.items() if method.make().moves_ranks]
GOOD = 5  # steps before trouble: averages and moments have values, ranks have moved


def start(name: str) -> tuple[torch.nn.Module, torch.optim.Optimizer, lorank.Ranks]:
    method = METHODS[name]
    model = adapted(tiny_llama(1), random_B=False, **method.lora).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    ranks = lorank.attach(
        model, optimizer, method.make(), validation_batch=token_batch(seed=99), total_steps=STEPS, seed=7
    )
    return model, optimizer, ranks


def step(model: torch.nn.Module, optimizer: torch.optim.Optimizer, seed: int, factor: float = 1.0) -> None:
    optimizer.zero_grad()
    (model(**token_batch(seed=seed)).loss * factor).backward()
    optimizer.step()


def everything(model: torch.nn.Module, optimizer: torch.optim.Optimizer, ranks: lorank.Ranks) -> dict[str, Any]:
    return copy.deepcopy({"weights": model.state_dict(), "optimizer": optimizer.state_dict(), "step": ranks.step})


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


@pytest.mark.parametrize("name", ADAPTIVE)
def test_a_nan_or_infinite_gradient(name: str) -> None:
    model, optimizer, ranks = start(name)
    for seed in range(GOOD):
        step(model, optimizer, seed)
    before = everything(model, optimizer, ranks)
    layer_name, layer = next((n, layer) for n, layer in reversed([*ranks.layers.items()]) if layer.rank)
    for value, said in ((torch.nan, "NaN"), (-torch.inf, "infinity")):
        optimizer.zero_grad()
        model(**token_batch(seed=50)).loss.backward()
        assert layer.B.grad is not None
        layer.B.grad[0, 0] = value
        with pytest.raises(NonFiniteError) as error:
            optimizer.step()
        message = str(error.value)
        assert f"step {GOOD + 1}: the gradient of {layer_name}.lora_B holds {said}." in message
        assert same(everything(model, optimizer, ranks), before)
    with pytest.raises(
        NonFiniteError, match=rf"step {GOOD + 1}: the gradient of .*lora_A.* holds NaN, and so do those"
    ):
        step(model, optimizer, 51, factor=torch.nan)  # a loss that is none
    assert same(everything(model, optimizer, ranks), before)
    # The batch is left out, and the run is the one that never met it.
    for seed in range(GOOD, STEPS):
        step(model, optimizer, seed)
    other, other_optimizer, others = start(name)
    for seed in range(STEPS):
        step(other, other_optimizer, seed)
    assert same(everything(model, optimizer, ranks), everything(other, other_optimizer, others))


def test_the_gradient_of_a_gate() -> None:
    model, optimizer, ranks = start("sora")
    assert ranks.layers.gates is not None
    model(**token_batch()).loss.backward()
    ranks.layers.gates.grad[0] = torch.nan
    with pytest.raises(NonFiniteError, match="of the learned gates holds NaN"):
        optimizer.step()


def test_large_gradients_are_finite() -> None:
    """Their squares would overflow."""
    model, optimizer, ranks = start("adalora")
    step(model, optimizer, 0, factor=1e25)
    assert ranks.step == 1


@pytest.mark.parametrize("name", ADAPTIVE)
def test_nan_or_infinite_weights_move_no_rank(name: str) -> None:
    """As after a step that nobody watched."""
    _, _, ranks = start(name)
    broken = next(iter(ranks.layers))
    with torch.no_grad():
        ranks.layers[broken].A[0, 0] = torch.inf
    before = ranks.layers.ranks
    with pytest.raises(NonFiniteError, match=f"step 0: the weights of {broken} are not finite. No rank was moved"):
        ranks._allocate()
    assert ranks.layers.ranks == before


def test_nan_scores_move_no_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer, ranks = start("adalora")
    allocate = type(ranks.allocator).allocate

    def broken(self: Any, context: Any, state: Any) -> Any:
        allocation = allocate(self, context, state)
        next(iter(allocation.scores.values()))[0] = torch.nan
        return allocation

    monkeypatch.setattr(type(ranks.allocator), "allocate", broken)
    before = ranks.layers.ranks
    name = next(iter(ranks.layers))
    for seed in range(3):
        step(model, optimizer, seed)
    with pytest.raises(NonFiniteError, match=f"step 4: AdaLoRA's scores of {name} hold NaN"):
        step(model, optimizer, 3)
    assert ranks.layers.ranks == before
