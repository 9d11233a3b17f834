"""Batches of tensors: texts of different lengths by transformers' collators, with a tokenizer that can pad; images."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import interpolate
from transformers import DataCollatorForSeq2Seq, DataCollatorWithPadding, PreTrainedTokenizerBase

from lorank.tasks.errors import DataError

Example = dict[str, Any]
"""An encoded example. Text: input_ids and attention_mask (lists of integers), labels (a list of equal length, or one).
Image: pixel_values (channels, height, width), labels (one number)."""


@dataclass(frozen=True)
class ImageCollator:
    """Makes a batch of images for a model: `pixel_values` (batch, channels, size, size) and `labels` (batch,).

    Args:
        size: pixels of a side; images of another size are resized bilinearly.
        channels: the one channel of an image is repeated for each.
    """

    size: int
    channels: int

    def __call__(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        images = torch.stack([example["pixel_values"] for example in examples])  # (batch, 1, height, width)
        if images.shape[-2:] != (self.size, self.size):
            images = interpolate(images, (self.size, self.size), mode="bilinear", antialias=True)
        images = images.expand(-1, self.channels, -1, -1).contiguous()
        return {"pixel_values": images, "labels": torch.tensor([example["labels"] for example in examples])}


Collator = DataCollatorWithPadding | DataCollatorForSeq2Seq | ImageCollator
"""Makes a batch of tensors from examples. `ImageCollator`: images. The others pad to the longest text, (batch,
longest). `DataCollatorWithPadding`: one label per text, (batch,), or no labels. `DataCollatorForSeq2Seq`: one label per
token, padded with `IGNORED`."""

IGNORED = -100
"""The label of tokens that the loss ignores, as in PyTorch's and transformers' losses."""


def length(example: Example) -> int:
    """The number of tokens of a text; 1 for an image, since the images of a task have one size."""
    return len(example["input_ids"]) if "input_ids" in example else 1


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
