"""Modules of one's own, which know nothing of transformers, PEFT or lorank. A fresh process runs this file alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

VOCABULARY = 64


class Own(nn.Module):
    """A module whose weights come from its seed, or from a folder."""

    @classmethod
    def seeded(cls) -> Any:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return cls()

    @classmethod
    def from_pretrained(cls, folder: str) -> Any:
        model = cls()
        model.load_state_dict(torch.load(Path(folder) / "weights.pt", weights_only=True))
        return model


class Perceptron(Own):
    """Predicts each token's successor from the token alone; a plain dictionary of loss and logits."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 16)
        self.first, self.second, self.out = nn.Linear(16, 24), nn.Linear(24, 16), nn.Linear(16, VOCABULARY)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Mapping[str, Tensor]:
        hidden = self.embed(input_ids)  # (n, T, 16)
        logits = self.out(hidden + self.second(torch.relu(self.first(hidden))))  # (n, T, VOCABULARY)
        if labels is None:
            return {"logits": logits}
        return {
            "loss": nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()),
            "logits": logits,
        }


class SelfAttention(nn.Module):
    """Attention whose projections have the usual names, and no configuration."""

    def __init__(self, width: int = 16, heads: int = 2) -> None:
        super().__init__()
        self.head_dim = width // heads
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        n, length, width = x.shape
        q, k, v = (
            projection(x).view(n, length, -1, self.head_dim).transpose(1, 2)  # (n, heads, T, d_h)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        out: Tensor = self.o_proj(mixed.transpose(1, 2).reshape(n, length, width))
        return out


class Attentive(Own):
    """One layer of attention between an embedding and an output."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.attention = nn.Embedding(VOCABULARY, 16), SelfAttention()
        self.out = nn.Linear(16, VOCABULARY)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Mapping[str, Tensor]:
        hidden = self.embed(input_ids)  # (n, T, 16)
        logits = self.out(hidden + self.attention(hidden))  # (n, T, VOCABULARY)
        if labels is None:
            return {"logits": logits}
        return {
            "loss": nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()),
            "logits": logits,
        }
