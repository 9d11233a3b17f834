"""Examples of different lengths become one batch of tensors: transformers' collators, on a tokenizer that can pad."""

from __future__ import annotations

import copy
from typing import Any, Literal

from transformers import DataCollatorForSeq2Seq, DataCollatorWithPadding, PreTrainedTokenizerBase

from lorank.tasks.errors import DataError

Example = dict[str, Any]
"""An encoded example: input_ids and attention_mask (lists of whole numbers), labels (a list as long, or one number)."""

Collator = DataCollatorWithPadding | DataCollatorForSeq2Seq
"""Pads examples to the longest of them and makes tensors, (batch, longest). The first: examples with one label each,
(batch,), or none; the second: with a label per token, padded with `IGNORED`."""

IGNORED = -100
"""The label of tokens that the loss skips, as in PyTorch's and transformers' losses."""


def padding_tokenizer(
    tokenizer: PreTrainedTokenizerBase, side: Literal["right", "left"] = "right"
) -> PreTrainedTokenizerBase:
    """A copy for a collator. Causal language models often have no token to pad with, and end-of-text serves: labels and
    attention masks hide it.

    Args:
        tokenizer: of the model; it stays as it is.
        side: where the padding goes: right for training, left for generation.

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
