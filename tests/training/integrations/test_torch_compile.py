"""Compiled models: the same run, one compilation per change of ranks, and no fall back to eager."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import nn

import lorank
from lorank.allocators import ALoRA
from lorank.errors import LorankError
from tests.methods import METHODS, WITH_DORA
from tests.models import adapted, tiny_llama, token_batch

LIMIT = 3  # how often PyTorch compiles a function before it gives up; 8 where nobody says otherwise
ROUNDS = 5


@pytest.fixture(autouse=True)
def _nothing_compiled() -> Any:
    torch.compiler.reset()
    with torch._dynamo.config.patch(recompile_limit=LIMIT):
        yield
    torch.compiler.reset()


def run(
    allocator: lorank.Allocator, steps: int, how: str, lora: Any = None
) -> tuple[lorank.Ranks, list[float], list[int]]:
    """Losses, and how many graphs had been compiled after each step."""
    model: nn.Module = adapted(
        tiny_llama(1), random_B=False, target_modules=["q_proj", "down_proj"], **(lora or {})
    ).train()
    graphs: list[int] = [0]

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs[-1] += 1
        return graph.forward

    if how == "wrapped":
        outer: Any = torch.compile(model, backend=backend)
    else:
        outer = model
        if how == "in place":
            model.compile(backend=backend)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    ranks = lorank.attach(outer, optimizer, allocator, validation_batch=token_batch(seed=99), total_steps=steps, seed=7)
    losses = []
    while ranks.step < steps:
        loss = outer(**token_batch(seed=ranks.step)).loss
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
        graphs.append(graphs[-1])
    ranks.detach()
    return ranks, losses, graphs


@pytest.mark.parametrize("how", ["wrapped", "in place"])
def test_every_change_of_ranks_compiles_once_however_many_there_are(how: str, caplog: pytest.LogCaptureFixture) -> None:
    allocator = ALoRA(k1=1, k2=1, rounds=ROUNDS, unit="steps", per_round=1)
    plain, expected, _ = run(allocator, ROUNDS + 4, "not at all")
    with caplog.at_level(logging.INFO, "lorank"):
        ranks, losses, graphs = run(allocator, ROUNDS + 4, how)
    assert losses == pytest.approx(expected, rel=1e-5)
    assert [r.ranks for r in ranks.history] == [r.ranks for r in plain.history]
    moved = sum(a.ranks != b.ranks for a, b in zip(ranks.history, ranks.history[1:], strict=False))
    assert moved > LIMIT
    # And one graph at most more, where PyTorch makes a size dynamic of its own accord.
    assert 1 + moved <= graphs[-1] <= 2 + moved
    assert f"ranks changed {moved} times" in caplog.text


# The other forms of ALoRA decide otherwise and compute alike; exact scores are in the test above.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # PEFT's DoRA
@pytest.mark.parametrize("name", ["static", "alora-first-order", "alora-dnas", "adalora", "sora", "ard", "dora"])
def test_methods_compile(name: str) -> None:
    method, steps = WITH_DORA[name], 5 if name == "dora" else 8  # DoRA compiles long
    _, expected, _ = run(method.make(), steps, "not at all", method.lora)
    ranks, losses, _ = run(method.make(), steps, "wrapped", method.lora)
    assert losses == pytest.approx(expected, rel=1e-5)
    assert name == "static" or len({tuple(record.ranks.values()) for record in ranks.history}) > 1


def test_ranks_per_head_are_refused_before_anything_changes() -> None:
    model = adapted(tiny_llama(1), random_B=False)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    with pytest.raises(LorankError, match=r"Train without torch\.compile, or keep one rank per module"):
        lorank.attach(torch.compile(model, backend="eager"), optimizer, METHODS["ard-heads"].make(), total_steps=4)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
