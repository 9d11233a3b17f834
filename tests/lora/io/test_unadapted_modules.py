"""The complete weights of a model that lacks the adapter in some modules, loaded into one that has it."""

from __future__ import annotations

import torch
from peft import LoraConfig

from lorank.lora import find_layers
from lorank.lora.io.unadapted_modules import wrap_unadapted_keys_
from tests.models import adapted, tiny_llama


def test_keys_of_modules_without_adapter_are_renamed_and_the_others_stay() -> None:
    live = tiny_llama(attention_bias=True)
    live.add_adapter(LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    other = tiny_llama(attention_bias=True)
    other.add_adapter(LoraConfig(r=2, target_modules=["v_proj"]))
    weights = other.state_dict()
    q = [f"model.layers.{i}.self_attn.q_proj" for i in range(2)]
    assert wrap_unadapted_keys_(find_layers(live), weights, "") == set(q)
    ours = {key for key in live.state_dict() if "q_proj.lora_" not in key}
    assert weights.keys() == ours
    for name in q:
        for part in ("weight", "bias"):
            original = tiny_llama(attention_bias=True).state_dict()[f"{name}.{part}"]
            assert torch.equal(weights[f"{name}.base_layer.{part}"], original)


def test_weights_of_an_adapter_are_not_touched() -> None:
    model = adapted(tiny_llama())
    for weights in (model.state_dict(), {key: value for key, value in model.state_dict().items() if "lora_" in key}):
        before = list(weights)
        assert wrap_unadapted_keys_(find_layers(model), weights, "") == set()
        assert list(weights) == before
