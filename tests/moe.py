"""Tiny mixtures of experts from configuration: the shapes in which transformers keeps the weights of experts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

EXPERTS = 3
PARAMETERS = ["experts.gate_up_proj", "experts.down_proj"]
_SHARED: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "num_experts_per_tok": 2,
}


@dataclass(frozen=True)
class Family:
    """A family of models.

    Args:
        make: creates the model, each time with the same weights.
        targets: the fields of its ``LoraConfig``.
    """

    make: Callable[[], PreTrainedModel]
    targets: dict[str, Any]


def _seeded(make: Callable[[], PreTrainedModel]) -> Callable[[], PreTrainedModel]:
    def seeded() -> PreTrainedModel:
        torch.manual_seed(0)
        return _with_weights(make())

    return seeded


@torch.no_grad()
def _with_weights(model: PreTrainedModel) -> PreTrainedModel:
    """Some families leave the parameters of experts as they were allocated."""
    for module in model.modules():
        if type(module).__name__.endswith("Experts"):
            for parameter in module.parameters(recurse=False):
                nn.init.normal_(parameter, std=0.1)
    return model


def tiny_mixtral(**changes: Any) -> PreTrainedModel:
    """(experts, outputs, inputs), computed by transformers' grouped product."""
    settings = {**_SHARED, "intermediate_size": 24, "num_local_experts": EXPERTS, **changes}
    return _seeded(lambda: MixtralForCausalLM(MixtralConfig(**settings)))()


def tiny_gpt_oss() -> PreTrainedModel:
    """(experts, inputs, outputs), gate and up columns in turn, with biases."""
    settings = {**_SHARED, "intermediate_size": 24, "num_local_experts": EXPERTS, "sliding_window": 8}
    return _seeded(lambda: GptOssForCausalLM(GptOssConfig(**settings)))()


def tiny_qwen3_moe() -> PreTrainedModel:
    settings = {**_SHARED, "intermediate_size": 48, "moe_intermediate_size": 24, "num_experts": EXPERTS}
    return _seeded(lambda: Qwen3MoeForCausalLM(Qwen3MoeConfig(**settings)))()


def tiny_llama4() -> PreTrainedModel:
    """(experts, inputs, outputs), every expert sees every token, scaled by the router."""
    settings = {
        **_SHARED,
        "num_experts_per_tok": 1,
        "intermediate_size": 24,
        "intermediate_size_mlp": 48,
        "num_local_experts": EXPERTS,
        "interleave_moe_layer_step": 1,
        "attention_chunk_size": 16,
    }
    return _seeded(lambda: Llama4ForCausalLM(Llama4TextConfig(**settings)))()


_TARGETS: dict[str, Any] = {"target_modules": ["q_proj"], "target_parameters": PARAMETERS}
FAMILIES = {
    "mixtral": Family(tiny_mixtral, _TARGETS),
    "qwen3_moe": Family(tiny_qwen3_moe, _TARGETS),
    "gpt_oss": Family(tiny_gpt_oss, _TARGETS),
    "llama4": Family(tiny_llama4, _TARGETS),
}
