"""The view on one layer, plain or gated, and on all layers."""

from __future__ import annotations

import pytest
import torch

from lorank.errors import AdapterError, PlanError
from lorank.lora import LayerPlan, find_layers, resize_
from tests.lora.forms import Q
from tests.models import adapted, tiny_llama


def test_a_gate_of_the_wrong_length_is_refused() -> None:
    layer = next(iter(find_layers(adapted(tiny_llama())).values()))
    with pytest.raises(AdapterError, match=r"shape \(4,\) or \(samples, 4\), got \(3,\)"):
        layer.gate = torch.ones(3)


@pytest.mark.parametrize("dora", [False, True])
def test_a_gate_is_put_over_the_layers_own_form_and_taken_away_again(dora: bool) -> None:
    layer = find_layers(adapted(tiny_llama(), use_dora=dora))[Q]
    own = layer.module.lora_variant.get("default")
    for value in (0.0, 1.0):
        layer.gate = torch.full((4,), value)
        assert layer.gate.tolist() == [value] * 4
        assert layer.form is own
    layer.gate = None
    assert layer.gate is None
    assert layer.module.lora_variant.get("default") is own


def test_a_layer_is_a_view_of_the_live_scaling_beside_that_of_alpha() -> None:
    model = adapted(tiny_llama(), lora_alpha=10)
    layer = find_layers(model)["model.layers.0.mlp.down_proj"]
    assert layer.A is layer.module.lora_A["default"].weight
    assert layer.B is layer.module.lora_B["default"].weight
    assert (layer.rank, layer.d_in, layer.d_out, layer.rank_parameters, layer.max_rank) == (4, 48, 32, 80, 32)
    assert repr(layer) == "AdapterLayer(model.layers.0.mlp.down_proj, rank=4, d_in=48, d_out=32, s=2.5)"
    assert layer.scaling_is_from_alpha
    layer.module.set_scale("default", 2)
    assert (layer.scaling, layer.file_scaling) == (5.0, 2.5)
    assert not layer.scaling_is_from_alpha
    layer.module.lora_alpha["default"] = 20
    assert (layer.scaling, layer.file_scaling) == (5.0, 5.0)


def test_an_embedding_is_a_layer_whose_inputs_are_its_rows() -> None:
    layer = find_layers(adapted(tiny_llama(), target_modules=["embed_tokens"]))["model.embed_tokens"]
    assert layer.is_embedding
    assert layer.A is layer.module.lora_embedding_A["default"]
    assert (layer.d_in, layer.d_out, layer.rank) == (64, 32, 4)


@pytest.mark.parametrize(
    ("lora", "with_bias", "fewest"),
    [
        ({}, True, 0),
        ({"use_dora": True}, False, 1),
        ({"lora_bias": True}, True, 1),
        ({"bias": "lora_only"}, True, 1),
        ({"bias": "all"}, True, 1),
        ({"bias": "all"}, False, 0),
        ({"bias": "lora_only"}, False, 0),
    ],
)
def test_the_smallest_rank(lora: dict, with_bias: bool, fewest: int) -> None:
    targets = ["q_proj", "v_proj", *([] if lora.get("lora_bias") else ["up_proj"])]
    layers = find_layers(adapted(tiny_llama(attention_bias=with_bias), target_modules=targets, **lora))
    assert layers[Q].min_rank == fewest
    assert layers[Q].uses_dora == bool(lora.get("use_dora"))
    if fewest:
        with pytest.raises(PlanError, match="which needs at least one rank; the plan leaves none"):
            resize_(layers, {Q: LayerPlan(())})
    if "up_proj" in targets:  # it has no bias
        assert layers["model.layers.0.mlp.up_proj"].min_rank == int("use_dora" in lora)


def test_learned_gates_of_another_number_are_refused() -> None:
    layers = find_layers(adapted(tiny_llama()))
    with pytest.raises(ValueError, match=r"gates for 56 ranks need shape \(56,\), got \(3,\)"):
        layers.learn_gates(torch.ones(3))
    assert layers.gates is None
