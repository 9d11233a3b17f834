"""The model shapes that benchmarks share: random weights, heads 64 wide."""

from __future__ import annotations

from torch import nn
from transformers import BertConfig, BertForMaskedLM, LlamaConfig, LlamaForCausalLM

VOCABULARY = 512


def bert(width: int, layers: int) -> nn.Module:
    return BertForMaskedLM(
        BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=width // 64,
            intermediate_size=4 * width,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )


def llama(width: int, layers: int, *, heads_per_key: int = 1) -> nn.Module:
    """``heads_per_key``: query heads that share a key and a value (grouped-query attention)."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=width // 64,
            num_key_value_heads=width // 64 // heads_per_key,
            intermediate_size=11 * width // 4 // 64 * 64,
        )
    )
