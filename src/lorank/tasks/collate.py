"""Batches of tensors from examples of different lengths: transformers' collators, with a tokenizer that can pad."""

from __future__ import annotations

import copy
from typing import Any, Literal

from transformers import DataCollatorForSeq2Seq, DataCollatorWithPadding, PreTrainedTokenizerBase

from lorank.tasks.errors import DataError

Example = dict[str, Any]
"""An encoded example: input_ids and attention_mask (lists of integers), labels (a list of equal length, or one)."""

Collator = DataCollatorWithPadding | DataCollatorForSeq2Seq
"""Pads examples to the longest one and makes tensors, (batch, longest). `DataCollatorWithPadding`: one label per
example, (batch,), or no labels. `DataCollatorForSeq2Seq`: one label per token, padded with `IGNORED`."""

IGNORED = -100
"""The label of tokens that the loss ignores, as in PyTorch's and transformers' losses."""


def padding_tokenizer(
    tokenizer: PreTrainedTokenizerBase, side: Literal["right", "left"] = "right"
) -> PreTrainedTokenizerBase:
    """A copy of the tokenizer that can pad, for a collator. A tokenizer of a causal language model often has no padding
    token. Then the end-of-text token is used: labels and attention masks hide it.

    Args:
        tokenizer: the model's tokenizer; it is not changed.
        side: the side of the padding: right for training, left for generation.

    Raises:
        DataError: the tokenizer has neither a padding nor an end-of-text token.
    """
    padding = copy.deepcopy(tokenizer)
    padding.padding_side = side
    if padding.pad_token_id is None:
        if padding.eos_token_id is None:
            raise DataError(
                f"The tokenizer {type(tokenizer).__name__} has neither a padding nor an end-of-text token. "
                "Set tokenizer.pad_token and save it with the model."
            )
        padding.pad_token = padding.eos_token
    return padding
