"""ALoRA-DNAS: bi-level steps against plain autograd, and ALoRA's rounds."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import lorank
from lorank.allocators import ALoRADNAS
from lorank.errors import ScheduleError, ValidationBatchError
from lorank.lora import find_layers
from tests.allocators.runs import SHORT, adamw, run_loop, same_run
from tests.models import adapted, tiny_llama, token_batch

QUICK = ALoRADNAS(k1=2, k2=2, rounds=3, unit="steps", per_round=6, search_rows=2)


def test_the_gates_are_those_of_a_bilevel_loop_in_plain_autograd() -> None:
    steps, rows = 25, 2
    split = token_batch(rows=5, seed=99)
    model, other = (adapted(tiny_llama(1)).double() for _ in range(2))
    optimizer = adamw(model)
    method = ALoRADNAS(k1=steps - 1, unit="steps", gate_lr=0.05, search_every=2, search_rows=rows)
    ranks = lorank.attach(model, optimizer, method, total_steps=steps, validation_batch=split)

    layers = find_layers(other)
    alphas = {n: torch.zeros(layer.rank, dtype=torch.float64, requires_grad=True) for n, layer in layers.items()}
    twin, search = adamw(other), torch.optim.Adam(alphas.values(), lr=0.05)

    def gate() -> None:
        for name, alpha in alphas.items():
            layers[name].gate = 2 * alpha.sigmoid()

    turn = 0
    for step in range(1, steps - 1):
        model(**token_batch(seed=step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

        gate()
        other(**token_batch(seed=step)).loss.backward()
        twin.step()
        twin.zero_grad()
        search.zero_grad()
        if step % 2 == 0:
            gate()
            picked = [(turn * rows + i) % 5 for i in range(rows)]
            other(**{key: value[picked] for key, value in split.items()}).loss.backward()
            search.step()
            twin.zero_grad()
            search.zero_grad()
            turn += 1
        gate()
        expected = torch.cat([layer.gate.detach() for layer in layers.values()])
        torch.testing.assert_close(ranks.layers.gates.values, expected, rtol=1e-8, atol=1e-12)
    assert (expected - 1).abs().max() > 0.1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gate_lr": 0.0}, "gate_lr=0"),
        ({"search_every": 0}, "search_every=0"),
        ({"search_rows": 0}, "search_rows=0"),
        ({"k2": 0}, r"ALoRADNAS\(k2=0\): expected a number above 0"),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        ALoRADNAS(**settings)


def test_ranks_move_by_their_gates_and_the_search_ends_with_the_last_round() -> None:
    ranks, _ = run_loop(QUICK, SHORT)
    records = ranks.history.allocations
    assert [record.step for record in records] == [2, 4, 6]
    for record, before in zip(records, ranks.history, strict=False):
        assert sum(map(len, record.pruned.values())) == 6
        lowest = sorted(score for scores in record.scores.values() for score in scores)[:6]
        assert sorted(record.scores[name][i] for name, gone in record.pruned.items() for i in gone) == lowest
        assert {name: len(scores) for name, scores in record.scores.items()} == before.ranks
    assert ranks.state["searched"] == 6
    assert ranks.layers.gates is None


@pytest.mark.parametrize("stop", [3, 4, 7])
def test_resume_is_bitwise(stop: int) -> None:
    same_run(QUICK, stop)


@pytest.mark.parametrize("budget", [2, "3k params"])
def test_the_budget_is_kept_at_every_moment(budget: Any) -> None:
    ranks, _ = run_loop(ALoRADNAS(k1=2, k2=2, rounds=3, unit="steps", per_round=6, budget=budget), SHORT)
    assert all(ranks.budget.fits(record.ranks) for record in ranks.history)


def test_dora() -> None:
    ranks, _ = run_loop(QUICK, SHORT, use_dora=True)
    assert min(ranks.layers.ranks.values()) >= 1
    assert len(set(ranks.layers.ranks.values())) > 1


def test_without_a_split_it_is_refused_before_training() -> None:
    model = adapted(tiny_llama())
    with pytest.raises(ValidationBatchError, match="ALoRADNAS scores ranks on a fixed batch"):
        lorank.attach(model, adamw(model), QUICK, total_steps=10)
