"""Layers are found by their classes, under the names of the base model; what cannot be resized is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

import lorank
from lorank.errors import AdapterError
from lorank.lora import HeadGroups, find_layers
from tests.lora.forms import OUT, Q, in_heads, logits
from tests.models import adapted, tiny_llama, token_batch
from tests.training.loops import QUICK, adamw


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


class Wrapper(nn.Module):
    """A larger model around others, as an encoder with a head, or the two encoders of a retriever."""

    def __init__(self, **inner: nn.Module) -> None:
        super().__init__()
        self.towers = nn.ModuleDict(inner)
        self.head = nn.Linear(32, 3)


def test_an_adapted_model_inside_a_larger_model_is_found_with_names_as_in_pefts_patterns() -> None:
    inner = adapted(tiny_llama())
    alone, layers = find_layers(inner), find_layers(Wrapper(text=inner, image=tiny_llama()))
    assert layers.model is inner
    assert list(layers) == list(alone)
    assert layers.prefix == alone.prefix
    assert all(layers[name].A is alone[name].A for name in alone)


def test_an_added_adapter_inside_a_larger_model_is_found() -> None:
    inner = tiny_llama()
    inner.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]))
    layers = find_layers(nn.Sequential(Wrapper(text=inner), nn.Linear(2, 2)))
    assert layers.model is inner
    assert list(layers) == [f"model.layers.{i}.self_attn.q_proj" for i in range(2)]


def test_the_models_inside_a_peft_model_have_the_same_names() -> None:
    model = adapted(tiny_llama())
    for inner in (model.base_model, model.get_base_model()):
        assert list(find_layers(inner)) == list(find_layers(model))


class TestErrors:
    def test_several_models_inside_a_larger_one(self) -> None:
        both = Wrapper(query=adapted(tiny_llama()), document=adapted(tiny_llama()))
        with pytest.raises(
            AdapterError,
            match=r"contains 2 .*towers\.query \(PeftModel\), towers\.document .*model=model\.towers\.query",
        ):
            find_layers(both)
        assert find_layers(both.towers["document"]).model is both.towers["document"]

    def test_layers_that_share_memory_and_not_a_parameter(self, tmp_path: Path) -> None:
        """PEFT's tied adapters."""
        base = tiny_llama(tie_word_embeddings=True)
        tied = adapted(base, ensure_weight_tying=True, target_modules=["embed_tokens", "q_proj"])
        before = {name: value.clone() for name, value in tied.state_dict().items()}
        with pytest.raises(
            AdapterError,
            match=r"embed_tokens and lm_head share a LoRA weight.*target_modules, or .*without ensure_weight_tying",
        ):
            lorank.attach(tied, adamw(tied), QUICK, validation_batch=token_batch(), total_steps=4)
        assert all(torch.equal(value, before[name]) for name, value in tied.state_dict().items())

    @pytest.mark.parametrize("targets", [["embed_tokens", "q_proj"], ["q_proj"]], ids=["untied", "left out"])
    @pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`", "ignore:Setting `save_embedding_layers`")
    def test_the_remedies_for_shared_memory_work(self, tmp_path: Path, targets: list[str]) -> None:
        model = adapted(tiny_llama(tie_word_embeddings=True), target_modules=targets)
        optimizer = adamw(model)
        ranks = lorank.attach(model, optimizer, QUICK, validation_batch=token_batch(), total_steps=4)
        for seed in range(4):
            model(**token_batch(seed=seed)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        ranks.detach()
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(tiny_llama(tie_word_embeddings=True), tmp_path)
        assert find_layers(loaded).ranks == {name: rank for name, rank in ranks.layers.ranks.items() if rank}
        assert torch.equal(logits(loaded), logits(model))

    def test_one_parameter_in_two_layers(self) -> None:
        model = adapted(tiny_llama())
        first, second = (layer.module for layer in list(find_layers(model).values())[:2])
        second.lora_A["default"].weight = first.lora_A["default"].weight
        with pytest.raises(AdapterError, match="share a LoRA weight"):
            find_layers(model)

    def test_views_of_one_buffer_without_overlap_are_not_shared(self) -> None:
        model = adapted(tiny_llama())
        weights = [weight for layer in find_layers(model).values() for weight in (layer.A, layer.B)]
        buffer = torch.zeros(sum(weight.numel() for weight in weights))
        for weight, part in zip(weights, torch.split(buffer, [w.numel() for w in weights]), strict=True):
            weight.data = part.view_as(weight)  # as DeepSpeed and other frameworks do
        assert len(find_layers(model)) == 14

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

    def test_dora_of_a_convolution_with_groups(self) -> None:
        class Net(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.conv = nn.Conv2d(4, 4, 3, groups=2)

        with pytest.warns(UserWarning, match="groups > 1"):
            model = get_peft_model(Net(), LoraConfig(r=2, target_modules=["conv"], use_dora=True))
        with pytest.raises(AdapterError, match="conv: PEFT's DoRA of a convolution with groups"):
            find_layers(model)

    def test_another_peft_method(self) -> None:
        from peft import IA3Config

        model = get_peft_model(tiny_llama(), IA3Config(target_modules=["q_proj"], feedforward_modules=[]))
        with pytest.raises(AdapterError, match="no LoRA layer found"):
            find_layers(model)
