"""A small network with convolutions of every kind, and pictures for it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_outputs import ImageClassifierOutput

KINDS = ("first", "strided", "grouped", "dilated", "reflected", "point", "one", "three")
"""The convolutions of :class:`ConvNet`."""
MERGED = ("first", "strided", "point", "one", "three")
"""Those whose LoRA PEFT can merge."""
WITH_DORA = ("first", "strided", "dilated", "reflected", "point", "one", "three")


class ConvNet(nn.Module):
    """Convolutions over images, sequences and volumes, with strides, groups, dilation and several paddings."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 8, 3, padding=1)
        self.strided = nn.Conv2d(8, 8, 3, stride=(2, 1), padding=1)
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.dilated = nn.Conv2d(8, 8, 3, padding="same", dilation=2)
        self.reflected = nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect", bias=False)
        self.point = nn.Conv2d(8, 8, 1)
        self.one = nn.Conv1d(8, 8, 3, padding=1)
        self.three = nn.Conv3d(1, 4, (3, 3, 1), padding=(1, 1, 0))
        self.norm = nn.GroupNorm(2, 8)
        self.head = nn.Linear(32, 10)

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> ImageClassifierOutput:
        x = self.strided(F.relu(self.first(pixel_values)))  # (n, 8, 4, 8)
        for layer in (self.grouped, self.dilated, self.reflected, self.point):
            x = x + F.relu(layer(self.norm(x)))
        x = x.flatten(2)  # (n, 8, 32)
        x = x + F.relu(self.one(self.norm(x)))
        volume = self.three(self.norm(x).unsqueeze(1).unsqueeze(-1)).squeeze(-1)  # (n, 4, 8, 32)
        logits = self.head(volume.mean(3).flatten(1))
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return ImageClassifierOutput(loss=loss, logits=logits)


def conv_net() -> Any:
    torch.manual_seed(0)
    return ConvNet()


def picture_batch(rows: int = 4, *, seed: int = 0) -> dict[str, Tensor]:
    """Random pictures (rows, 1, 8, 8), and labels that depend on them."""
    generator = torch.Generator().manual_seed(seed)
    pictures = torch.randn(rows, 1, 8, 8, generator=generator)
    return {"pixel_values": pictures, "labels": (pictures.mean((1, 2, 3)) * 20).long().clamp(-4, 5) + 4}
