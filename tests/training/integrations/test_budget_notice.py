"""What a budget does to ranks and parameters is logged in one line at the start, and a change of size is warned of."""

from __future__ import annotations

import logging

import pytest
import torch

import lorank
from tests.models import adapted, tiny_llama, token_batch
from tests.training.loops import adamw


def run(method: lorank.Allocator, r: int = 4, steps: int = 0, **lora: object) -> lorank.Ranks:
    model = adapted(tiny_llama(), r=r, **lora)
    optimizer = adamw(model)
    ranks = lorank.attach(model, optimizer, method, validation_batch=token_batch(), total_steps=20, progress=False)
    for i in range(steps):
        model(**token_batch(seed=i)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return ranks


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, "lorank")
    return caplog


def first_line(log: pytest.LogCaptureFixture) -> logging.LogRecord:
    return next(record for record in log.records if "trained parameters in" in record.message)


def test_the_first_line_gives_the_size_and_the_steps(log: pytest.LogCaptureFixture) -> None:
    ranks = run(lorank.ALoRA())
    line = first_line(log)
    assert line.levelno == logging.INFO
    assert line.message == (
        f"ALoRA: 56 ranks, {ranks.layers.parameters:,} trained parameters in 14 modules; "
        "ranks move after step 2, 3, 4, 5, … (8 times)"
    )


def test_a_budget_larger_than_the_adapter_is_a_warning_with_both_sizes(log: pytest.LogCaptureFixture) -> None:
    """A budget in bytes may be many times the size of the adapter."""
    small = run(lorank.StaticLoRA()).layers
    log.clear()
    grown = run(lorank.ALoRA(budget="40kB")).layers
    line = first_line(log)
    assert line.levelno == logging.WARNING
    assert (
        f"56 → {grown.total_rank} ranks, {small.parameters:,} → {grown.parameters:,} trained parameters" in line.message
    )
    assert "budget: 40000 bytes" in line.message
    times = grown.parameters / small.parameters
    assert times > 2
    assert f"trains {times:.3g} times the parameters of the adapter that you made" in line.message


def test_heads_are_a_change_of_size(log: pytest.LogCaptureFixture) -> None:
    ranks = run(lorank.ARDLoRA(), random_B=False)
    assert f"→ {ranks.layers.parameters:,} trained parameters" in first_line(log).message
    assert first_line(log).levelno == logging.WARNING


def grow_the_largest(ranks: lorank.Ranks, count: int) -> None:
    """Moves ``count`` ranks from the modules with the cheapest ranks to the module with the most expensive ones."""
    by_cost = sorted(ranks.layers, key=lambda name: ranks.layers[name].rank_parameters)
    plan = {}
    for name in by_cost[:count]:
        layer = ranks.layers[name]
        plan[name] = lorank.lora.LayerPlan(tuple(range(layer.rank - 1)))
    largest = ranks.layers[by_cost[-1]]
    plan[by_cost[-1]] = lorank.lora.LayerPlan(tuple(range(largest.rank)), count)
    lorank.lora.resize_(ranks.layers, plan, ranks.optimizer)


def test_a_budget_in_ranks_that_grows_the_parameters_is_warned_of_once(log: pytest.LogCaptureFixture) -> None:
    ranks = run(lorank.ALoRA(k1=5, k2=1, rounds=2, per_round=1, unit="steps"), steps=4)
    before = ranks.layers.parameters
    for _ in range(3):
        grow_the_largest(ranks, 6)
    assert ranks.layers.parameters > 1.1 * before
    log.clear()
    model = ranks.layers.model
    for i in range(4):
        model(**token_batch(seed=i)).loss.backward()
        ranks.optimizer.step()
        ranks.optimizer.zero_grad()
    (warning,) = [record.message for record in log.records if record.levelno == logging.WARNING]
    assert "more than the" in warning
    assert f"budget={{'parameters': {before}}}" in warning


def test_a_run_that_shrinks_by_more_than_a_tenth_is_warned_of_once_with_the_remedy(
    log: pytest.LogCaptureFixture,
) -> None:
    ranks = run(lorank.ALoRA(k1=2, k2=1, rounds=6, per_round=27, unit="steps"), r=2, steps=10)
    assert ranks.layers.total_rank < 0.9 * 28
    (warning,) = [record.message for record in log.records if "has shrunk to" in record.message]
    assert "give a smaller per_round" in warning
    log.clear()
    stable = run(lorank.ALoRA(), r=2, steps=20)  # the remedy, and the default
    assert stable.layers.total_rank >= 0.9 * 28
    assert "has shrunk" not in log.text


@pytest.mark.parametrize("method", [lorank.AdaLoRA(), lorank.SoRA(), lorank.SoRA(budget="20 ranks")])
def test_a_method_that_prunes_down_to_its_budget_has_not_shrunk(
    method: lorank.Allocator, log: pytest.LogCaptureFixture
) -> None:
    ranks = run(method, steps=20)
    assert ranks.layers.total_rank < 40
    assert "has shrunk" not in log.text
    torch.testing.assert_close(ranks.layers.total_rank, ranks.budget.constraints[0].limit, rtol=0.1, atol=0)
