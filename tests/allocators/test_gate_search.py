"""The search for gates: no trace but the gates, gates of new ranks, and whose turn it is."""

from __future__ import annotations

import pytest
import torch

from lorank.allocators.gate_search import GateSearchScorer, cyclic_rows
from lorank.errors import ValidationBatchError
from lorank.lora import LayerPlan, find_layers, rank_origins, resize_
from lorank.scoring import Context, TrainingInfo
from tests.models import adapted, tiny_llama, token_batch

SEARCH = GateSearchScorer(gate_lr=1e-2, search_every=1, search_rows=2)


def test_a_search_leaves_no_trace_but_the_gates() -> None:
    model = adapted(tiny_llama(), lora_dropout=0.5).train()
    layers = find_layers(model)
    run = TrainingInfo(10, initial_ranks=layers.ranks)
    state = SEARCH.start(layers, run)
    assert not any(leaf.requires_grad for leaf in layers.gates.leaves.values())
    model(**token_batch()).loss.backward()
    gradients = {
        name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None
    }
    random = torch.get_rng_state()
    SEARCH.after_step(Context(1, run, model, layers, token_batch(rows=4, seed=9)), state)
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
    state = SEARCH.start(layers, run)
    context = Context(1, run, model, layers, token_batch(rows=4, seed=9))
    SEARCH.after_step(context, state)
    names, before = list(layers), layers.gates.values.clone()
    plan = {names[0]: LayerPlan((3, 1)), names[1]: LayerPlan((0, 1, 2, 3), 1)}
    origins = rank_origins(plan, layers.ranks)
    resize_(layers, plan)
    SEARCH.after_resize(context, state, origins)
    assert layers.gates.values[:7].tolist() == [before[3], before[1], *before[4:8], 1]
    torch.testing.assert_close(2 * state["alphas"].sigmoid(), layers.gates.values)
    assert not any(leaf.requires_grad for leaf in layers.gates.leaves.values())
    SEARCH.after_step(context, state)
    assert (layers.gates.values[:6] != 1).all()


def test_rows_are_taken_in_turn() -> None:
    batch = {"x": torch.arange(5), "y": torch.arange(10).view(5, 2), "scale": torch.tensor(3.0), "kind": "a"}
    turns = [cyclic_rows(batch, turn, 2) for turn in range(3)]
    assert [turn["x"].tolist() for turn in turns] == [[0, 1], [2, 3], [4, 0]]
    assert turns[1]["y"].tolist() == [[4, 5], [6, 7]]
    assert turns[0]["scale"] == 3
    assert turns[0]["kind"] == "a"
    assert cyclic_rows(batch, 1, 99)["x"].tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(ValidationBatchError, match=r"have \[2, 5\] rows"):
        cyclic_rows({"x": torch.zeros(5), "y": torch.zeros(2)}, 0, 2)


def test_after_the_end_gates_stay_as_they_are_found_also_those_of_a_resumed_run() -> None:
    model = adapted(tiny_llama())
    layers = find_layers(model)
    run = TrainingInfo(10, initial_ranks=layers.ranks)
    state = SEARCH.start(layers, run)
    layers.gates.freeze(False)  # as they are when they have been loaded
    SEARCH.end(Context(5, run, model, layers), state)
    assert not any(leaf.requires_grad for leaf in layers.gates.leaves.values())
    assert (layers.gates.values == 1).all()


def test_the_state_is_made_beside_the_gates_but_for_what_the_host_counts() -> None:
    layers = find_layers(adapted(tiny_llama()))
    layers.model.to("meta")
    state = SEARCH.start(layers, TrainingInfo(10, initial_ranks=layers.ranks))
    assert {name for name, tensor in state.items() if tensor.device.type == "cpu"} == {"searched", "adam.step"}


def test_without_a_split_there_is_nothing_to_search_on() -> None:
    model = adapted(tiny_llama())
    layers = find_layers(model)
    run = TrainingInfo(10, initial_ranks=layers.ranks)
    state = SEARCH.start(layers, run)
    with pytest.raises(ValidationBatchError, match="a second split of the data: give validation_batch"):
        SEARCH.after_step(Context(1, run, model, layers), state)
