"""Layers are switched to the fused forward and back; what keeps PEFT's forward is named with its reason."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lorank.lora import AdapterLayers, find_layers, fuse_, is_compiled, unfuse_
from lorank.lora.variants.fused import FusedLora
from lorank.lora.variants.gated import GatedLora
from tests.lora.forms import in_heads, plain_and_reserved
from tests.messages import warnings_of_lorank
from tests.models import adapted, tiny_bert, tiny_llama


def fused(layers: AdapterLayers) -> int:
    variants = [layer.module.lora_variant.get("default") for layer in layers.values()]
    return sum(isinstance(v.replaced if isinstance(v, GatedLora) else v, FusedLora) for v in variants)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("dora", [False, True])
def test_every_layer_is_fused_under_its_gate_and_becomes_what_it_was(dora: bool, gated: bool) -> None:
    layers = find_layers(adapted(tiny_llama(), use_dora=dora))
    own = {name: layer.module.lora_variant.get("default") for name, layer in layers.items()}
    if gated:
        layers.learn_gates()
    assert fuse_(layers) == {}
    assert fused(layers) == 14
    assert all((layer.gate is not None) == gated for layer in layers.values())
    assert len({id(variant.dropout) for variant in map(_fused_variant, layers.values())}) == 1
    unfuse_(layers)
    assert fused(layers) == 0
    layers.drop_gates()
    assert {name: layer.module.lora_variant.get("default") for name, layer in layers.items()} == own


def _fused_variant(layer: Any) -> Any:
    variant = layer.module.lora_variant["default"]
    return variant.replaced if isinstance(variant, GatedLora) else variant


def test_fusing_again_changes_nothing() -> None:
    layers = find_layers(adapted(tiny_llama()))
    fuse_(layers)
    variants = [layer.module.lora_variant["default"] for layer in layers.values()]
    fuse_(layers)
    assert [layer.module.lora_variant["default"] for layer in layers.values()] == variants


def test_layers_that_cannot_be_fused_are_logged() -> None:
    layers = find_layers(adapted(tiny_bert(), lora_bias=True))
    with warnings_of_lorank() as messages:
        unfused = fuse_(layers)
    assert fused(layers) == 0
    assert unfused == {"lora_bias": list(layers)}
    (message,) = messages
    assert f"0 of {len(layers)} modules use the fused forward" in message
    assert f"{len(layers)} for lora_bias" in message
    with warnings_of_lorank() as messages:
        fuse_(layers, already_logged=unfused)
    assert not messages


def test_an_embedding_is_skipped_without_a_log_line() -> None:
    layers = find_layers(adapted(tiny_llama(), target_modules=["q_proj", "embed_tokens"]))
    with warnings_of_lorank() as messages:
        fuse_(layers)
    assert fused(layers) == 2
    assert not messages


def test_layers_with_reserved_ranks_are_skipped_without_a_log_line() -> None:
    layers = find_layers(plain_and_reserved()[1])
    with warnings_of_lorank() as messages:
        assert fuse_(layers) == {}
    assert fused(layers) == 0
    assert not messages


def test_heads_get_the_dropout_of_the_fused_layers() -> None:
    _, layers, _ = in_heads()
    fuse_(layers)
    heads = [layer.form for layer in layers.values() if layer.groups is not None]
    plain = [layer.module.lora_variant["default"] for layer in layers.values() if layer.groups is None]
    assert len(heads) == 6
    assert {id(one.dropout) for one in (*heads, *plain)} == {id(plain[0].dropout)}
    unfuse_(layers)
    assert all(one.dropout is None for one in heads)


def test_other_layers_are_fused_beside_one_that_cannot_be() -> None:
    layers = find_layers(adapted(tiny_llama(), use_dora=True))
    first, second, third, *_ = layers.values()
    first.module.get_base_layer().weight.data = first.module.get_base_layer().weight.data.bfloat16()
    second.module.lora_dropout["default"] = nn.AlphaDropout(0.1)
    third.module.get_base_layer().register_full_backward_hook(lambda *_: None)
    with warnings_of_lorank() as messages:
        fuse_(layers)
    (message,) = messages
    assert "11 of 14 modules use the fused forward" in message
    assert "2 for DoRA on a base layer that is" in message
    assert "1 for an unsupported dropout (AlphaDropout)" in message
    assert fused(layers) == 11


def test_nothing_is_fused_for_torch_compile() -> None:
    layers = find_layers(adapted(tiny_llama()))
    assert fuse_(layers, compiled=True) == {"torch.compile, which fuses by itself": list(layers)}
    assert fused(layers) == 0


def test_a_model_is_compiled_if_one_of_its_modules_is() -> None:
    def model() -> nn.Module:
        return nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2)))

    plain, in_place, wrapped = model(), model(), model()
    in_place[1].compile(backend="eager")
    assert not is_compiled(plain)
    assert is_compiled(in_place)
    assert is_compiled(torch.compile(wrapped, backend="eager"))
