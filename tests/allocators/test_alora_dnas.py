"""ALoRA-DNAS: bi-level steps against plain autograd, no trace of the search, and ALoRA's rounds."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import lorank
from lorank.allocators import ALoRADNAS, Context, TrainingInfo
from lorank.allocators.alora_dnas import rows_in_turn
from lorank.errors import ScheduleError, ValidationBatchError
from lorank.lora import LayerPlan, find_layers, rank_origins, resize_
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


def test_a_search_leaves_no_trace_but_the_gates() -> None:
    model = adapted(tiny_llama(), lora_dropout=0.5).train()
    layers = find_layers(model)
    run = TrainingInfo(10, initial_ranks=layers.ranks)
    state = QUICK.start(layers, run)
    assert not any(leaf.requires_grad for leaf in layers.gates.leaves.values())
    model(**token_batch()).loss.backward()
    gradients = {
        name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None
    }
    random = torch.get_rng_state()
    QUICK.after_step(Context(1, run, model, layers, token_batch(rows=4, seed=9)), state)
    assert (layers.gates.values != 1).all()
    assert not layers.gates.grad.any()
    assert not any(leaf.requires_grad for leaf in layers.gates.leaves.values())
    assert torch.equal(torch.get_rng_state(), random)
    assert all(module.training for module in model.modules())
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == (name not in gradients)
        assert parameter.grad is None or torch.equal(parameter.grad, gradients[name])


def test_new_ranks_start_at_a_gate_of_one_and_kept_ones_keep_theirs() -> None:
    model = adapted(tiny_llama())
    layers = find_layers(model)
    run = TrainingInfo(10, initial_ranks=layers.ranks)
    state = QUICK.start(layers, run)
    context = Context(1, run, model, layers, token_batch(rows=4, seed=9))
    QUICK.after_step(context, state)
    names, before = list(layers), layers.gates.values.clone()
    plan = {names[0]: LayerPlan((3, 1)), names[1]: LayerPlan((0, 1, 2, 3), 1)}
    origins = rank_origins(plan, layers.ranks)
    resize_(layers, plan)
    QUICK.after_resize(context, state, origins)
    assert layers.gates.values[:7].tolist() == [before[3], before[1], *before[4:8], 1]
    torch.testing.assert_close(2 * state["alphas"].sigmoid(), layers.gates.values)
    assert not any(leaf.requires_grad for leaf in layers.gates.leaves.values())
    QUICK.after_step(context, state)
    assert (layers.gates.values[:6] != 1).all()


def test_rows_are_taken_in_turn() -> None:
    batch = {"x": torch.arange(5), "y": torch.arange(10).view(5, 2), "scale": torch.tensor(3.0), "kind": "a"}
    turns = [rows_in_turn(batch, turn, 2) for turn in range(3)]
    assert [turn["x"].tolist() for turn in turns] == [[0, 1], [2, 3], [4, 0]]
    assert turns[1]["y"].tolist() == [[4, 5], [6, 7]]
    assert turns[0]["scale"] == 3
    assert turns[0]["kind"] == "a"
    assert rows_in_turn(batch, 1, 99)["x"].tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(ValidationBatchError, match=r"have \[2, 5\] rows"):
        rows_in_turn({"x": torch.zeros(5), "y": torch.zeros(2)}, 0, 2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gate_lr": 0.0}, "gate_lr=0"),
        ({"search_every": 0}, "search_every=0"),
        ({"search_rows": 0}, "search_rows=0"),
        ({"k2": 0}, r"ALoRADNAS\(k1=1.0, k2=0\)"),
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
