"""Models that train a dozen steps in a fraction of a second. They are made from a configuration, without any files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

VOCABULARY = 64


@dataclass(frozen=True)
class TinyModel:
    """A model for the conformance suite.

    Args:
        make: creates the model, each time with the same weights.
        batch: a function from a number to a batch: a mapping from the names of the model's arguments to tensors,
            including ``labels``. The same number gives the same batch.
        auto: the name of the transformers class that loads the saved model, for example ``"AutoModelForCausalLM"``.
    """

    make: Callable[[], PreTrainedModel]
    batch: Callable[[int], dict[str, Tensor]]
    auto: str


def _llama() -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=VOCABULARY,
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=64,
                pad_token_id=0,
            )
        )


def _tokens(number: int) -> dict[str, Tensor]:
    """Four rows of random tokens, (4, 10). Some rows are shorter; their padding has no labels."""
    generator = torch.Generator().manual_seed(number)
    tokens = torch.randint(3, VOCABULARY, (4, 10), generator=generator)
    lengths = torch.tensor([10, 9, 8, 7])
    mask = (torch.arange(10) < lengths.unsqueeze(1)).long()  # (4, 10)
    tokens = tokens.masked_fill(mask == 0, 0)
    return {"input_ids": tokens, "attention_mask": mask, "labels": tokens.masked_fill(mask == 0, -100)}


TINY_LLAMA = TinyModel(_llama, _tokens, "AutoModelForCausalLM")
"""A random Llama of two blocks with grouped-query attention: 14 linear layers, 32 wide."""
