"""LoRA of experts' parameters: the layout, gates, a change of ranks, files, and what is refused."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

import lorank
from lorank.errors import AdapterError
from lorank.lora import (
    AdapterLayer,
    AdapterLayers,
    Basis,
    HeadGroups,
    LayerPlan,
    find_layers,
    head_groups,
    load_adapter,
    resize_,
    resize_on_load,
    save_adapter,
)
from lorank.lora.rank_layout import RankAxis, RankLayout
from lorank.scoring import UpdateSvd
from lorank.testing.plain_peft import plain_peft
from tests.models import adapted, token_batch
from tests.moe import EXPERTS, FAMILIES, Family, tiny_mixtral

GATE_UP, DOWN = (f"model.layers.0.mlp.experts.{end}" for end in ("gate_up_proj", "down_proj"))
BATCH = token_batch()
IGNORED = pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning")


def mixtral(**lora: Any) -> tuple[PeftModel, AdapterLayers]:
    model = adapted(tiny_mixtral(), **{**FAMILIES["mixtral"].targets, **lora}).eval()
    return model, find_layers(model)


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    found: Tensor = model.eval()(**BATCH).logits
    return found


def in_float64(model: PeftModel) -> PeftModel:
    """PyTorch's grouped product has no float64."""
    model.config._experts_implementation = "eager"
    return model.double()


def update_of(layer: AdapterLayer, gate: Tensor | None = None) -> list[Tensor]:
    """s · B_e diag(g) A_e of every expert, by the definition of the layout."""
    r, E = layer.rank, layer.layout.experts
    g = torch.ones(r) if gate is None else gate
    return [
        layer.scaling
        * sum(
            g[i] * torch.outer(layer.B.detach()[:, i * E + e], layer.A.detach()[e * r + i]) for i in range(r)
        )
        for e in range(E)
    ]  # fmt: skip


def test_every_parameter_is_a_layer_of_its_own() -> None:
    _, layers = mixtral()
    assert list(layers)[:3] == ["model.layers.0.self_attn.q_proj", GATE_UP, DOWN]
    down, gate_up = layers[DOWN], layers[GATE_UP]
    assert (down.path, gate_up.path) == (f"{DOWN.rpartition('.')[0]}", f"{DOWN.rpartition('.')[0]}.base_layer")
    assert (down.rank, down.max_rank, down.min_rank) == (4, 24, 0)
    assert down.rank_parameters == EXPERTS * (24 + 32)
    assert gate_up.rank_parameters == EXPERTS * (32 + 48)
    assert layers.parameters == sum(p.numel() for n, p in layers.model.named_parameters() if "lora_" in n)
    assert layers.parameters == sum(layer.rank * (layer.d_in + layer.d_out) for layer in layers.values())


def rows_of(axis: RankAxis, values: Tensor) -> Tensor:
    """What each rank owns, (r, d)."""
    matrix = axis.matrix(values)
    return matrix if axis.axis == 0 else matrix.T


@pytest.mark.parametrize("axis", [0, 1])
def test_the_layout_is_its_own_inverse(axis: int) -> None:
    layout, r = RankLayout(EXPERTS), 4
    numbers = torch.arange(r * EXPERTS)
    weight = numbers[:, None] * torch.ones(5) if axis == 0 else numbers * torch.ones(5, 1)
    assert torch.equal(layout.joined(layout.by_expert(weight, axis), axis, weight.shape), weight)
    owned = [{e * r + i if axis == 0 else i * EXPERTS + e for e in range(EXPERTS)} for i in range(r)]
    own = layout.axes[axis]
    assert [set(row.tolist()) for row in rows_of(own, weight)] == owned
    entries = own.expand_origins(torch.tensor([2, -1, 0]), r)
    after = rows_of(own, entries[:, None] if axis == 0 else entries[None])
    assert [set(row.tolist()) for row in after] == [owned[2], {-1}, owned[0]]


@pytest.mark.parametrize("family", [FAMILIES[name] for name in ("mixtral", "gpt_oss", "llama4")])
def test_a_gate_multiplies_its_rank_in_every_expert(family: Family) -> None:
    model = adapted(family.make(), **family.targets).eval()
    layers = find_layers(model)
    layer = next(layer for name, layer in layers.items() if name.endswith("down_proj"))
    plain = logits(model)
    gate = torch.tensor([1.0, 0.0, 0.5, -1.0])
    layer.gate = gate
    gated = logits(model)
    assert not torch.allclose(plain, gated, atol=1e-4)
    found = layer.module.get_delta_weight("default")
    expected = torch.stack(update_of(layer, gate))
    torch.testing.assert_close(found, expected if layer.module._did_swap_in_out_features else expected.mT)
    by_hand = copy.deepcopy(model)
    twin = next(one for name, one in find_layers(by_hand).items() if name.endswith("down_proj"))
    twin.gate = None
    with torch.no_grad():
        twin.B.mul_(gate.repeat_interleave(EXPERTS))
    torch.testing.assert_close(logits(by_hand), gated, rtol=1e-6, atol=1e-6)
    # what leaves the model is a plain LoRA with the gate in it
    state = model.state_dict()
    assert torch.equal(state[next(key for key in state if "layers.0" in key and key.endswith("experts.lora_B.default.weight"))], twin.B)  # fmt: skip  # noqa: E501
    assert torch.equal(logits(copy.deepcopy(model)), gated)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    assert torch.equal(logits(torch.load(buffer, weights_only=False)), gated)
    merged = copy.deepcopy(model).merge_and_unload()
    torch.testing.assert_close(logits(merged), gated, rtol=1e-5, atol=1e-5)
    layer.gate = None
    assert torch.equal(logits(model), plain)
    assert not {"get_delta_factors", "get_delta_weight"} & vars(layer.module).keys()


def test_the_gradient_of_a_gate_is_the_product_of_weight_and_gradient() -> None:
    model, layers = mixtral()
    layer = layers[GATE_UP]
    gates = layers.learn_gates()
    model(**BATCH).loss.backward()
    products = layer.axes[0].matrix(layer.A.detach() * layer.A.grad).sum(1)
    torch.testing.assert_close(gates.leaves[GATE_UP].grad, products, rtol=1e-4, atol=1e-6)


def test_moments_are_kept_as_in_a_twin_whose_ranks_are_all_there() -> None:
    """Sixteen steps in float64: ranks 0 and 2 leave and two come after eight. The twin has six ranks, and masks."""
    keep, add, steps = (3, 1), 2, 16
    family = FAMILIES["mixtral"]
    model = in_float64(adapted(family.make(), **family.targets)).train()
    twin_model = in_float64(adapted(family.make(), r=6, lora_alpha=12, **family.targets)).train()
    layers, twins = find_layers(model), find_layers(twin_model)
    first, later = torch.tensor([0, 1, 2, 3]), torch.tensor([*keep, 4, 5])
    with torch.no_grad():
        for key, layer in layers.items():
            place(twins[key], layer, first)
    optimizers = [
        torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
        for m in (model, twin_model)
    ]
    live = first
    for step in range(steps):
        if step == steps // 2:
            resize_(layers, dict.fromkeys(layers, LayerPlan(keep, add)), optimizers[0], seed=1)
            live = later
            with torch.no_grad():
                for key, layer in layers.items():
                    place(twins[key], layer, later)
        for m, optimizer in zip((model, twin_model), optimizers, strict=True):
            m(**token_batch(seed=step)).loss.backward()
            if m is twin_model:
                for twin in twins.values():
                    mask_(twin.A.grad, twin, live, 0)
                    mask_(twin.B.grad, twin, live, 1)
            optimizer.step()
            optimizer.zero_grad()
        for twin in twins.values():
            mask_(twin.A.data, twin, live, 0)  # the moments of ranks that have left would move them on
            mask_(twin.B.data, twin, live, 1)
    for key, layer in layers.items():
        for axis, (weight, whole) in enumerate(zip((layer.A, layer.B), (twins[key].A, twins[key].B), strict=True)):
            expected = rows_of(twins[key].axes[axis], whole.detach())[later]
            torch.testing.assert_close(rows_of(layer.axes[axis], weight.detach()), expected, rtol=1e-9, atol=1e-11)


def place(twin: AdapterLayer, layer: AdapterLayer, places: Tensor) -> None:
    """Gives the twin the layer's ranks at these places, and nothing at the others."""
    for axis, (own, weight) in enumerate(zip((twin.A, twin.B), (layer.A, layer.B), strict=True)):
        given = layer.layout.by_expert(weight.detach(), axis)
        spread = torch.zeros_like(twin.layout.by_expert(own.detach(), axis))
        rank_axis = 1 if axis == 0 else 2
        spread.index_copy_(rank_axis, places, given)
        own.copy_(twin.layout.joined(spread, axis, own.shape))


def mask_(values: Tensor | None, layer: AdapterLayer, live: Tensor, axis: int) -> None:
    """Sets the numbers of ranks that are not live to zero."""
    assert values is not None
    mask = torch.zeros(layer.rank, dtype=values.dtype)
    mask[live] = 1
    layer.layout.by_expert(values, axis).mul_(mask[:, None] if axis == 0 else mask)


def test_a_basis_turns_the_ranks_of_every_expert_and_not_the_function() -> None:
    model, layers = mixtral()
    in_float64(model)
    before = logits(model)
    generator = torch.Generator().manual_seed(0)
    shared = torch.randn(4, 4, generator=generator, dtype=torch.float64)
    own = torch.randn(EXPERTS, 4, 4, generator=generator, dtype=torch.float64)
    every = (0, 1, 2, 3)
    resize_(
        layers,
        {
            GATE_UP: LayerPlan(every, basis=Basis(shared, torch.linalg.inv(shared))),
            DOWN: LayerPlan(every, basis=Basis(own, torch.linalg.inv(own))),
        },
    )
    torch.testing.assert_close(logits(model), before, rtol=1e-9, atol=1e-9)
    with pytest.raises(lorank.errors.PlanError, match="has matrices of shapes"):
        resize_(layers, {DOWN: LayerPlan(every, basis=Basis(own[:2], torch.linalg.inv(own[:2])))})


class TestFiles:
    @IGNORED
    @pytest.mark.parametrize("empty", [[DOWN], [GATE_UP], [GATE_UP, DOWN]], ids=["outer", "inner", "both"])
    def test_plain_peft_loads_any_ranks(self, empty: list[str], tmp_path: Path) -> None:
        model, layers = mixtral()
        plan = {GATE_UP: LayerPlan((0, 3), 1), DOWN: LayerPlan((1,))} | dict.fromkeys(empty, LayerPlan(()))
        resize_(layers, plan)
        assert sorted(layers.config.target_parameters) == ["experts.down_proj", "experts.gate_up_proj"]
        after = logits(model)
        model.save_pretrained(tmp_path / "adapter")
        tiny_mixtral().save_pretrained(tmp_path / "base")
        found = plain_peft().logits(tmp_path / "base", tmp_path / "adapter", BATCH)
        assert torch.equal(found["logits"], after)
        torch.testing.assert_close(found["merged"], after, rtol=1e-5, atol=1e-5)
        # lorank gives what the file holds as a rank of zeros its rank 0 back
        again = load_adapter(tiny_mixtral(), tmp_path / "adapter")
        assert find_layers(again).ranks == layers.ranks
        assert torch.equal(logits(again), after)

    @IGNORED
    def test_a_live_model_takes_the_ranks_of_what_it_loads(self, tmp_path: Path) -> None:
        model, layers = mixtral()
        resize_(layers, {GATE_UP: LayerPlan((0, 3), 1), DOWN: LayerPlan(())})
        after, state = logits(model), copy.deepcopy(model.state_dict())
        save_adapter(layers, tmp_path / "adapter")
        for load in (
            lambda m: m.load_state_dict(state),
            lambda m: m.load_adapter(str(tmp_path / "adapter"), "default", is_trainable=True),
        ):
            other, others = mixtral(r=5, lora_alpha=10)
            resize_on_load(others)
            load(other)
            assert others.ranks == layers.ranks
            assert torch.equal(logits(other), after)
            load(other)  # also where the rank is 0 already
            assert torch.equal(logits(other), after)


@pytest.mark.parametrize("rank", [2, 6])
def test_resize_adapter_is_the_best_approximation_of_every_expert(rank: int) -> None:
    model, layers = mixtral()
    before = {name: update_of(layers[name]) for name in (GATE_UP, DOWN)}
    found = UpdateSvd(layers[DOWN]).values * layers[DOWN].scaling
    lorank.resize_adapter_(model, rank=rank)
    for name, updates in before.items():
        errors = [(a - b).square().sum() for a, b in zip(updates, update_of(layers[name]), strict=True)]
        left_out = [torch.linalg.svdvals(one.double())[rank:].square().sum() for one in updates]
        torch.testing.assert_close(
            torch.stack(errors).double(),
            torch.stack(left_out),
            rtol=1e-3,
            atol=1e-8,
            msg=f"{name}, {errors}, {left_out}",
        )
    total = sum(one.double().square().sum() for one in before[DOWN])
    torch.testing.assert_close(found.square().sum(), total, rtol=1e-5, atol=0)


def test_one_matrix_is_a_parameter_too() -> None:
    model = get_peft_model(
        tiny_mixtral(), LoraConfig(r=3, target_modules=["q_proj"], target_parameters=["mlp.gate.weight"])
    )
    layers = find_layers(model)
    layer = layers["model.layers.1.mlp.gate.weight"]
    nn.init.normal_(layer.B)
    assert (layer.layout.experts, layer.rank_parameters, layer.max_rank) == (1, 32 + EXPERTS, EXPERTS)
    whole = logits(model)
    layer.gate = torch.tensor([1.0, 0.0, 2.0])
    gated = logits(model)
    resize_(layers, {layer.name: LayerPlan((0, 2))})
    torch.testing.assert_close(logits(model), gated, rtol=1e-5, atol=1e-5)
    layer.gate = None
    assert not torch.equal(logits(model), whole)
    resize_(layers, {layer.name: LayerPlan(())})
    assert torch.isfinite(logits(model)).all()


class TestRefused:
    def test_a_gate_per_sample(self) -> None:
        _, layers = mixtral()
        with pytest.raises(AdapterError, match="none has its own gate"):
            layers[DOWN].gate = torch.ones(4, layers[DOWN].rank)

    def test_reserved_ranks(self) -> None:
        model, _ = mixtral(target_modules=[])
        with pytest.raises(AdapterError, match="gate_up_proj is a parameter: ranks can only be reserved"):
            lorank.reserve_(model, 8)

    def test_heads(self) -> None:
        _, layers = mixtral()
        with pytest.raises(AdapterError, match="is a parameter, which has no heads"):
            head_groups(layers, {DOWN: HeadGroups("rows", 4, 8)})
