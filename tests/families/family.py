"""What a row of the table of families is: a tiny model from its configuration, its batches, and what is adapted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

from tests.models import VOCABULARY
from tests.scoring.families import labels_of, noise, span, text_to_text, tokens

__all__ = ["VOCABULARY", "Family", "built", "labels_of", "next_token", "noise", "span", "text_to_text", "tokens"]

Batch = Callable[[int], dict[str, Tensor]]


@dataclass(frozen=True)
class Family:
    """One family of models.

    Args:
        task: what the model is trained for, as the table says it.
        make: makes the model; its weights are random and always the same.
        batch: from a number of samples to a batch with labels.
        modules: PEFT's ``target_modules``: names, or one regular expression.
        output: the field of the model's output that is compared.
        auto: the transformers class that loads the base, or ``FILE.py:CLASS`` for a module of one's own; empty: the
            model's own class.
        lora: more of the ``LoraConfig``.
        inner: from the made model to the transformers model that gets the adapter, if that is a part of it.
        loss_fn: the loss of a model that gives none.
        parts: of the names of modules; in each part of the model ranks must move.
    """

    task: str
    make: Callable[[], nn.Module]
    batch: Batch
    modules: list[str] | str = "all-linear"
    output: str = "logits"
    auto: str = ""
    lora: dict[str, Any] = field(default_factory=dict)
    inner: Callable[[nn.Module], nn.Module] | None = None
    loss_fn: Callable[[nn.Module, Any], Tensor] | None = None
    parts: tuple[str, ...] = ("",)


def built(config: str, model: str, **settings: Any) -> Callable[[], nn.Module]:
    """A function that makes a transformers model from a configuration, with the same weights in each call."""

    def make() -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return getattr(hf, model)(getattr(hf, config)(**settings))

    return make


def next_token(rows: int) -> dict[str, Tensor]:
    """For causal language models; the last rows are shorter."""
    ids, mask = tokens(rows), torch.ones(rows, 9, dtype=torch.long)
    mask[rows // 2 :, 7:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
