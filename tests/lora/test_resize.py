"""Resizing: the output stays, what is kept is kept bitwise, errors leave nothing half-done."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import Tensor

from lorank.errors import OptimizerStateError, PlanError
from lorank.lora import LayerPlan, find_layers, resize_
from tests.lora.forms import Q
from tests.lora.optimizers import OPTIMIZERS, train_step, trainable
from tests.models import adapted, tiny_bert, tiny_gpt2, tiny_llama, token_batch


@st.composite
def changes(draw: st.DrawFn, ranks: list[int], capacity: int = 32) -> list[LayerPlan]:
    """One plan for each layer: any subset of its ranks in any order, and some new ones; at least one rank in all."""
    plans = []
    for rank in ranks:
        keep = draw(st.permutations(range(rank)))[: draw(st.integers(0, rank))]
        plans.append(LayerPlan(tuple(keep), draw(st.integers(0, min(3, capacity - len(keep))))))
    if not any(plan.rank for plan in plans):
        plans[0] = LayerPlan(plans[0].keep, 1)
    return plans


@pytest.mark.parametrize(
    ("make", "lora"),
    [
        (tiny_llama, {"target_modules": ["q_proj", "k_proj", "down_proj", "embed_tokens"]}),
        (tiny_gpt2, {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}),
        (tiny_bert, {"target_modules": ["query", "dense"], "use_rslora": True}),
    ],
    ids=["llama_and_embedding", "gpt2_conv1d", "bert_rslora"],
)
@pytest.mark.parametrize("optimizer_name", ["adamw_fused", "sgd_momentum"])
@settings(max_examples=6, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_random_sequences_of_prunes_and_growths(make, lora, optimizer_name, data) -> None:
    """Dropped ranks had gate 0, so the output stays; kept ones keep value, gradient and moments bitwise.

    In float64: the bound is for what resizing does, and single precision's rounding of small logits may exceed it.
    """
    model = adapted(make(), **lora).double()
    optimizer = OPTIMIZERS[optimizer_name](trainable(model))
    batch = token_batch()
    if make is tiny_bert:
        batch["labels"] = torch.arange(4) % 3
    layers = find_layers(model)
    parameters = {name: (layer.A, layer.B) for name, layer in layers.items()}
    scalings = {name: layer.scaling for name, layer in layers.items()}
    for _ in range(3):
        model.train()
        train_step(model, optimizer, batch)
        model.eval()
        plans = dict(zip(layers, data.draw(changes([layer.rank for layer in layers.values()])), strict=True))
        for name, layer in layers.items():
            gate = torch.zeros(layer.rank)
            gate[list(plans[name].keep)] = 1
            layer.gate = gate
        before = {name: _snapshot(layer, optimizer) for name, layer in layers.items()}
        with torch.no_grad():
            expected = model(**batch).logits
        rng = torch.get_rng_state()
        resize_(layers, plans, optimizer, seed=7)
        assert torch.equal(torch.get_rng_state(), rng)
        for name, layer in layers.items():
            keep = list(plans[name].keep)
            assert layer.rank == plans[name].rank == layer.module.r["default"]
            assert parameters[name] == (layer.A, layer.B)
            assert layer.gate.tolist() == [1.0] * layer.rank
            assert layer.module.scaling["default"] == pytest.approx(scalings[name], rel=1e-15)
            for old, new, axis in _pairs(before[name], _snapshot(layer, optimizer)):
                assert torch.equal(new.narrow(axis, 0, len(keep)), old.index_select(axis, torch.tensor(keep).long()))
                grown = new.narrow(axis, len(keep), plans[name].add)
                assert (
                    (old is before[name]["A"][0] and not layer.is_embedding)
                    or (old is before[name]["B"][0] and layer.is_embedding)
                    or not grown.any()
                )
            layer.gate = None
        with torch.no_grad():
            actual = model(**batch).logits
        assert (actual - expected).abs().max() <= 1e-6 * expected.abs().max()
    train_step(model, optimizer, batch)


def _snapshot(layer: Any, optimizer: torch.optim.Optimizer) -> dict[str, list[Tensor]]:
    """A's and B's value, gradient and full-shaped state, as copies."""
    found = {}
    for label, parameter in (("A", layer.A), ("B", layer.B)):
        state = [value for value in optimizer.state[parameter].values() if value is not None and value.dim() == 2]
        found[label] = [tensor.detach().clone() for tensor in (parameter, parameter.grad, *state)]
    return found


def _pairs(before: dict[str, list[Tensor]], after: dict[str, list[Tensor]]) -> list[tuple[Tensor, Tensor, int]]:
    return [
        (old, new, axis)
        for label, axis in (("A", 0), ("B", 1))
        for old, new in zip(before[label], after[label], strict=True)
    ]


def test_accumulated_gradients_survive() -> None:
    """A resize between two backward passes, while the first one's graph is still alive."""
    model = adapted(tiny_llama())
    layers = find_layers(model)
    optimizer = OPTIMIZERS["adamw"](trainable(model))
    kept_loss = model(**token_batch()).loss
    kept_loss.backward(retain_graph=True)
    gradient = layers[Q].A.grad.clone()
    resize_(layers, {Q: LayerPlan((3, 0), 1)}, optimizer)
    assert torch.equal(layers[Q].A.grad[:2], gradient[[3, 0]])
    model(**token_batch(seed=1)).loss.backward()
    assert layers[Q].A.grad.shape == (3, 32)
    optimizer.step()


def test_a_module_at_rank_0_trains_on_and_can_grow_again() -> None:
    for make in OPTIMIZERS.values():
        model = adapted(tiny_llama())
        optimizer = make(trainable(model))
        layers = find_layers(model)
        train_step(model, optimizer, token_batch())
        resize_(layers, {Q: LayerPlan(())}, optimizer)
        train_step(model, optimizer, token_batch())
        assert layers[Q].rank == 0
        resize_(layers, {Q: LayerPlan((), 2)}, optimizer)
        train_step(model, optimizer, token_batch())
        assert layers[Q].B.any()


def test_new_ranks_are_drawn_as_peft_draws_them() -> None:
    for init, check in (
        (True, lambda A: A.abs().max() <= 32**-0.5 and A.abs().max() > 0.9 * 32**-0.5),
        ("gaussian", lambda A: 0.8 / 28 < A.std() < 1.2 / 28),
    ):
        layers = find_layers(adapted(tiny_llama(), init_lora_weights=init))
        resize_(layers, {Q: LayerPlan((0,), 27)})
        assert check(layers[Q].A.data[1:])


def test_new_ranks_depend_on_the_seed_and_the_module_alone() -> None:
    drawn = []
    for seed, names in ((5, [Q]), (5, list(find_layers(adapted(tiny_llama())))), (6, [Q])):
        layers = find_layers(adapted(tiny_llama()))
        torch.rand(17)
        resize_(layers, {name: LayerPlan((0,), 1) for name in names}, seed=seed)
        drawn.append(layers[Q].A.data[1])
        if len(names) > 1:
            others = torch.stack([layers[name].A.data[1] for name in names if layers[name].d_in == 32])
            assert len(others.unique(dim=0)) == len(others)
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


class TestErrors:
    @pytest.mark.parametrize(
        ("plan", "message"),
        [
            ({"nowhere": LayerPlan((0,))}, "names 'nowhere', which is not one of the 14"),
            ({Q: LayerPlan((0, 4))}, r"has ranks 0 to 3, and each can be kept once; the plan keeps \[0, 4\]"),
            ({Q: LayerPlan((1, 1))}, r"keeps \[1, 1\]"),
            ({Q: LayerPlan((0,), 32)}, r"at most min\(d_in, d_out\) = 32 ranks; the plan asks for 33"),
        ],
    )
    def test_a_plan_that_cannot_be(self, plan, message: str) -> None:
        layers = find_layers(adapted(tiny_llama()))
        with pytest.raises(PlanError, match=message):
            resize_(layers, plan)
        assert set(layers.ranks.values()) == {4}

    def test_a_plan_that_leaves_nothing(self) -> None:
        layers = find_layers(adapted(tiny_llama()))
        with pytest.raises(PlanError, match="leaves no rank in any module"):
            resize_(layers, dict.fromkeys(layers, LayerPlan(())))

    def test_inference_mode(self) -> None:
        layers = find_layers(adapted(tiny_llama()))
        with torch.inference_mode(), pytest.raises(PlanError, match="inference_mode"):
            resize_(layers, {Q: LayerPlan((0,))})

    def test_merged(self) -> None:
        model = adapted(tiny_llama())
        layers = find_layers(model)
        model.merge_adapter()
        with pytest.raises(PlanError, match="merged"):
            resize_(layers, {Q: LayerPlan((0,))})

    def test_an_optimiser_without_the_parameters(self) -> None:
        model = adapted(tiny_llama())
        layers = find_layers(model)
        other = torch.optim.SGD(adapted(tiny_llama()).parameters(), lr=0.1)
        with pytest.raises(OptimizerStateError, match=r"does not hold .*q_proj.lora_A: make it from the PEFT model's"):
            resize_(layers, {Q: LayerPlan((0,))}, other)
        with pytest.raises(OptimizerStateError, match=r"expected a torch.optim.Optimizer .* got str"):
            resize_(layers, {Q: LayerPlan((0,))}, "adamw")

    def test_a_state_of_unknown_shape_stops_everything_before_anything_moved(self) -> None:
        model = adapted(tiny_llama())
        optimizer = OPTIMIZERS["adamw"](trainable(model))
        train_step(model, optimizer, token_batch())
        layers = find_layers(model)
        last = list(layers)[-1]
        optimizer.state[layers[last].B]["exp_avg"] = torch.zeros(3, 3)
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(OptimizerStateError, match=rf"'exp_avg' of {last}.lora_B has shape \(3, 3\)"):
            resize_(layers, {name: LayerPlan((0,)) for name in layers}, optimizer)
        after = model.state_dict()
        assert all(torch.equal(before[key], after[key]) for key in before)
        assert set(layers.ranks.values()) == {4}


@pytest.mark.parametrize("native", [False, True], ids=["PeftModel", "add_adapter"])
def test_the_users_own_configuration_stays_and_a_second_model_starts_like_the_first(native: bool) -> None:
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])

    def make() -> torch.nn.Module:
        model = tiny_llama()
        if not native:
            return get_peft_model(model, config)
        model.add_adapter(config)
        return model

    model = make()
    before = copy.deepcopy(config.to_dict())
    layers = find_layers(model)
    start = layers.ranks
    first, second, *_ = layers
    resize_(layers, {first: LayerPlan(()), second: LayerPlan((0, 1, 2, 3), 4)})
    assert config.to_dict() == before
    live = model.peft_config["default"]
    assert live is layers.config is find_layers(model).config
    assert live is not config
    assert live.r == 8
    for module in model.modules():  # every dictionary of PEFT holds the live one
        assert all(one is live for one in getattr(module, "peft_config", {}).values())
    assert find_layers(make()).ranks == start
    resize_(find_layers(model), {second: LayerPlan((0,))})  # through another view: the first one sees it
    assert layers.config is model.peft_config["default"]
    assert layers.config.r == 4
    assert live.r == 8
