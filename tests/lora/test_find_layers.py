"""Layers are found by their classes, under the names of the base model; what cannot be resized is refused."""

from __future__ import annotations

import pytest
from peft import LoraConfig, get_peft_model
from torch import nn

from lorank.errors import AdapterError
from lorank.lora import HeadGroups, find_layers
from tests.lora.forms import OUT, Q, in_heads
from tests.models import adapted, tiny_llama


def test_layers_are_found_in_the_models_order_with_names_of_the_base_model() -> None:
    layers = find_layers(adapted(tiny_llama()))
    assert len(layers) == 14
    assert next(iter(layers)) == "model.layers.0.self_attn.q_proj"
    assert layers.total_rank == 14 * 4
    assert layers.parameters == sum(layer.A.numel() + layer.B.numel() for layer in layers.values())


def test_an_adapter_added_to_a_transformers_model_is_found() -> None:
    model = tiny_llama()
    model.add_adapter(LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    assert find_layers(model).ranks == {
        f"model.layers.{i}.self_attn.{part}_proj": 2 for i in range(2) for part in ("q", "v")
    }


def test_find_layers_finds_layers_in_per_head_form() -> None:
    model, layers, _ = in_heads()
    again = find_layers(model)
    assert again[Q].head_ranks == layers[Q].head_ranks
    assert again[OUT].groups == HeadGroups("columns", 4, 8)


class TestErrors:
    def test_no_adapter(self) -> None:
        with pytest.raises(AdapterError, match=r"no LoRA layer found in LlamaForCausalLM.*get_peft_model"):
            find_layers(tiny_llama())

    def test_wrong_adapter_name(self) -> None:
        with pytest.raises(AdapterError, match="no adapter 'defalt'; the model has: default"):
            find_layers(adapted(tiny_llama()), "defalt")

    def test_merged(self) -> None:
        model = adapted(tiny_llama())
        model.merge_adapter()
        with pytest.raises(AdapterError, match="is merged into the base weights"):
            find_layers(model)

    def test_an_unsupported_variant(self) -> None:
        with pytest.raises(AdapterError, match="ALoraLinearVariant, whose forward lorank does not support"):
            find_layers(adapted(tiny_llama(), alora_invocation_tokens=[5], task_type="CAUSAL_LM"))

    def test_convolutions(self) -> None:
        class Net(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.conv = nn.Conv2d(3, 3, 3)

        with pytest.raises(AdapterError, match="conv is a Conv2d"):
            find_layers(get_peft_model(Net(), LoraConfig(r=2, target_modules=["conv"])))

    def test_another_peft_method(self) -> None:
        from peft import IA3Config

        model = get_peft_model(tiny_llama(), IA3Config(target_modules=["q_proj"], feedforward_modules=[]))
        with pytest.raises(AdapterError, match="no LoRA layer found"):
            find_layers(model)
