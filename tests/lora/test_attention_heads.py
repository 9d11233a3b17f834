"""Heads are found in the models themselves, whatever the family calls its projections."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    AutoModel,
    BertConfig,
    BloomConfig,
    CLIPConfig,
    FalconConfig,
    GPTNeoXConfig,
    Phi3Config,
    T5Config,
    ViTConfig,
)

from lorank.errors import AdapterError
from lorank.lora import AdapterLayers, find_layers
from lorank.lora.attention_heads import head_groups
from lorank.lora.kernels.per_head import HeadGroups
from tests.models import adapted, tiny_bert, tiny_gpt2, tiny_llama


def named(layers: AdapterLayers, groups: dict[str, HeadGroups], part: str) -> set[HeadGroups | None]:
    """The heads of every layer whose name contains ``part``."""
    found = {groups.get(name) for name in layers if part in name}
    assert found, f"no layer is called {part}"
    return found


def heads_of(model: nn.Module, **lora: Any) -> tuple[AdapterLayers, dict[str, HeadGroups]]:
    layers = find_layers(get_peft_model(model, LoraConfig(r=2, **{"target_modules": "all-linear", **lora})))
    return layers, head_groups(layers)


SMALL: dict[str, Any] = {"vocab_size": 32, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}

CASES: dict[str, tuple[Callable[[], nn.Module], dict[str, HeadGroups | None]]] = {
    "llama": (
        lambda: tiny_llama(1),
        {
            "q_proj": HeadGroups("rows", 4, 8),
            "k_proj": HeadGroups("rows", 2, 8),  # grouped-query attention
            "v_proj": HeadGroups("rows", 2, 8),
            "o_proj": HeadGroups("columns", 4, 8),
            "down_proj": None,
            "gate_proj": None,
        },
    ),
    "llama, heads wider than hidden_size / heads": (
        lambda: tiny_llama(1, head_dim=16),
        {"q_proj": HeadGroups("rows", 4, 16), "o_proj": HeadGroups("columns", 4, 16)},
    ),
    "bert": (
        tiny_bert,
        {
            "query": HeadGroups("rows", 4, 8),
            "attention.output.dense": HeadGroups("columns", 4, 8),
            "intermediate": None,
            "0.output.dense": None,  # the FFN's, of the same name
        },
    ),
    "gpt2": (
        tiny_gpt2,
        {
            "c_attn": HeadGroups("rows", 12, 8),
            "attn.c_proj": HeadGroups("columns", 4, 8),
            "mlp.c_proj": None,
        },
    ),
    "phi3": (
        lambda: AutoModel.from_config(Phi3Config(**SMALL, num_key_value_heads=2, intermediate_size=48, pad_token_id=0)),
        {"qkv_proj": HeadGroups("rows", 8, 8), "o_proj": HeadGroups("columns", 4, 8), "gate_up": None},
    ),
    "t5": (
        lambda: AutoModel.from_config(T5Config(vocab_size=32, d_model=32, d_kv=4, d_ff=48, num_layers=1, num_heads=6)),
        {
            "SelfAttention.q": HeadGroups("rows", 6, 4),
            "EncDecAttention.v": HeadGroups("rows", 6, 4),
            "SelfAttention.o": HeadGroups("columns", 6, 4),
            "DenseReluDense.wo": None,
        },
    ),
    "gpt_neox": (
        lambda: AutoModel.from_config(GPTNeoXConfig(**SMALL, intermediate_size=48)),
        {"query_key_value": HeadGroups("rows", 12, 8), "attention.dense": HeadGroups("columns", 4, 8), "mlp": None},
    ),
    "bloom": (
        lambda: AutoModel.from_config(BloomConfig(vocab_size=32, hidden_size=32, n_layer=1, n_head=4)),
        {"query_key_value": HeadGroups("rows", 12, 8), "self_attention.dense": HeadGroups("columns", 4, 8)},
    ),
    "falcon, multi-query": (
        lambda: AutoModel.from_config(FalconConfig(**SMALL)),
        {"query_key_value": HeadGroups("rows", 6, 8), "mlp": None},
    ),
    "vit": (
        lambda: AutoModel.from_config(
            ViTConfig(
                hidden_size=32,
                num_hidden_layers=1,
                num_attention_heads=4,
                intermediate_size=48,
                image_size=8,
                patch_size=4,
            )
        ),
        {"q_proj": HeadGroups("rows", 4, 8), "fc1": None},
    ),
    "clip, two towers": (
        lambda: AutoModel.from_config(
            CLIPConfig(
                text_config={**SMALL, "intermediate_size": 48},
                vision_config={
                    "hidden_size": 24,
                    "num_hidden_layers": 1,
                    "num_attention_heads": 2,
                    "intermediate_size": 48,
                    "image_size": 8,
                    "patch_size": 4,
                },
            )
        ),
        {
            "text_model.encoder.layers.0.self_attn.q_proj": HeadGroups("rows", 4, 8),
            "vision_model.encoder.layers.0.self_attn.out_proj": HeadGroups("columns", 2, 12),
        },
    ),
}


@pytest.mark.parametrize("family", CASES)
def test_the_heads_of_every_projection(family: str) -> None:
    make, expected = CASES[family]
    layers, groups = heads_of(make(), fan_in_fan_out=family == "gpt2")  # as PEFT wants it for Conv1D
    for part, heads in expected.items():
        assert named(layers, groups, part) == {heads}, part
    assert list(groups) == [name for name in layers if name in groups]


def test_embeddings_have_no_heads() -> None:
    layers = find_layers(adapted(tiny_llama(1), target_modules=["q_proj", "embed_tokens"]))
    assert [name.rsplit(".", 1)[-1] for name in head_groups(layers)] == ["q_proj"]


def test_overrides_win_the_longest_name_first() -> None:
    layers = find_layers(adapted(tiny_llama(2), target_modules=["q_proj", "v_proj", "down_proj"]))
    groups = head_groups(
        layers,
        {
            "q_proj": HeadGroups("rows", 8, 4),
            "layers.1.self_attn.q_proj": HeadGroups("rows", 2, 16),
            "v_proj": None,
            "down_proj": HeadGroups("columns", 3, 16),
        },
    )
    assert groups["model.layers.0.self_attn.q_proj"] == HeadGroups("rows", 8, 4)
    assert groups["model.layers.1.self_attn.q_proj"] == HeadGroups("rows", 2, 16)
    assert groups["model.layers.0.mlp.down_proj"] == HeadGroups("columns", 3, 16)
    assert not any("v_proj" in name for name in groups)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ({"q_proj": HeadGroups("rows", 5, 6)}, r"32 output rows, but 5 heads of width 6 have 30"),
        ({"o_proj": HeadGroups("columns", 4, 9)}, r"32 input columns, but 4 heads of width 9 have 36"),
        ({"x_proj": None}, "'x_proj', which matches none of the"),
        ({"embed_tokens": HeadGroups("rows", 4, 8)}, "an embedding, which has no heads"),
    ],
)
def test_heads_that_do_not_fit_are_refused(overrides: dict[str, HeadGroups | None], said: str) -> None:
    layers = find_layers(adapted(tiny_llama(1), target_modules=["q_proj", "o_proj", "embed_tokens"]))
    with pytest.raises(AdapterError, match=said):
        head_groups(layers, overrides)


def test_a_model_whose_heads_do_not_divide_it_is_refused_with_the_numbers() -> None:
    class OddAttention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head_dim = 5
            self.q_proj = nn.Linear(32, 32)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.q_proj(x)

    with pytest.raises(AdapterError, match=r"q_proj has 32 output rows, but 6 heads of width 5 have 30"):
        heads_of(nn.Sequential(OddAttention()), target_modules=["q_proj"])


def test_an_attention_without_a_known_head_width_is_one_group_with_a_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class MuteAttention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q_proj = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.q_proj(x)

    assert heads_of(nn.Sequential(MuteAttention()), target_modules=["q_proj"])[1] == {}
    assert "head width was not found" in caplog.text


@pytest.mark.parametrize("settings", [("diagonal", 1, 1), ("rows", 0, 4), ("columns", 4, 0)])
def test_groups_out_of_range_are_refused(settings: tuple[Any, int, int]) -> None:
    with pytest.raises(AdapterError, match="expected 'rows' or 'columns'"):
        HeadGroups(*settings)


def test_a_configuration_that_does_not_divide_is_refused() -> None:
    class Config:
        hidden_size, num_attention_heads = 30, 4

    class BareAttention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.config = Config()
            self.q_proj = nn.Linear(30, 30)

    with pytest.raises(AdapterError, match="hidden_size=30, which is not divisible by 4 heads"):
        heads_of(nn.Sequential(BareAttention()), target_modules=["q_proj"])


def test_bert_finds_the_width_without_attributes_in_its_configuration() -> None:
    model = tiny_bert()
    for module in model.modules():
        if hasattr(module, "attention_head_size"):
            del module.attention_head_size
    layers, groups = heads_of(model)
    assert named(layers, groups, "attention.output.dense") == {HeadGroups("columns", 4, 8)}
    assert isinstance(model.config, BertConfig)
