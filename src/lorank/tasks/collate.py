"""Examples of different lengths become one batch of tensors."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

Example = Mapping[str, Any]
"""An encoded example: input_ids and attention_mask (lists of whole numbers), labels (a list as long, or one number)."""

IGNORED = -100
"""The label of tokens that the loss skips, as in PyTorch's and transformers' losses."""


@dataclass(frozen=True)
class Collator:
    """Pads a list of examples to the longest of them; transformers' Trainer takes it as its data collator.

    Args:
        pad_token_id: what input_ids are padded with.
        side: where the padding goes: right for training, left for generation.
    """

    pad_token_id: int
    side: Literal["right", "left"] = "right"

    def __call__(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """Tensors of shape (batch, longest); labels that are one number per example become shape (batch,)."""
        filler = {"input_ids": self.pad_token_id, "labels": IGNORED}
        return {name: self._column([e[name] for e in examples], filler.get(name, 0)) for name in examples[0]}

    def _column(self, values: Sequence[Any], filler: int) -> Tensor:
        if not isinstance(values[0], list):
            return torch.tensor(values)  # (batch,)
        width = max(len(value) for value in values)
        if self.side == "left":
            return torch.tensor([[filler] * (width - len(value)) + value for value in values])  # (batch, width)
        return torch.tensor([value + [filler] * (width - len(value)) for value in values])  # (batch, width)
