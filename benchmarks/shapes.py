"""The models of benchmarks: random weights, heads of width 64; a Llama of 8 billion parameters for a GPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn
from transformers import BertConfig, BertForMaskedLM, LlamaConfig, LlamaForCausalLM

VOCABULARY = 512
BERT_MAPS = r".*layer\.\d+\..*(query|key|value|dense)"
LLAMA_MAPS = r".*layers\..*_proj"


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


def llama(width: int, layers: int, *, heads_per_key: int = 1, vocabulary: int = VOCABULARY) -> nn.Module:
    """A Llama; ``heads_per_key`` query heads share a key and a value (grouped-query attention)."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=width // 64,
            num_key_value_heads=width // 64 // heads_per_key,
            intermediate_size=11 * width // 4 // 64 * 64,
        )
    )


def llama_8b() -> nn.Module:
    """The shape of Llama 3.1 8B."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=128_256,
            hidden_size=4096,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=8,
            intermediate_size=14_336,
            max_position_embeddings=8192,
        )
    )


@dataclass(frozen=True)
class Shape:
    """A model and the size of its batch.

    Args:
        make: makes the model with random weights, on the default device and in the default dtype.
        targets: the adapted linear maps, as PEFT's ``target_modules``.
        rows: rows of the batch.
        tokens: tokens per row.
    """

    make: Callable[[], nn.Module]
    targets: str
    rows: int
    tokens: int


SHAPES = {
    "tiny": Shape(lambda: llama(128, 2, heads_per_key=2), LLAMA_MAPS, 2, 16),
    "S": Shape(lambda: bert(384, 6), BERT_MAPS, 16, 128),
    "M": Shape(lambda: llama(512, 8), LLAMA_MAPS, 8, 128),
    "L": Shape(lambda: llama(1024, 6), LLAMA_MAPS, 4, 128),
    "8B": Shape(llama_8b, LLAMA_MAPS, 4, 512),
}
"""``tiny`` is for tests of the benchmarks; ``8B`` needs a GPU."""
