"""What the documentation's code blocks take as given: a base model, an adapted model, an optimiser, data.

Pages import it in hidden blocks (:mod:`tests.doc_blocks`). The model is tiny, so that a block takes a fraction of a
second.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel, TrainingArguments

from tests.models import VOCABULARY, tiny_llama, token_batch

TARGETS = {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}


class Batches:
    """An endless stream of batches, for ``for`` and ``next``, that is also a list of four."""

    def __init__(self) -> None:
        self._stream = (token_batch(2, seed=seed) for seed in itertools.count())

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return itertools.islice(self._stream, 8)

    def __next__(self) -> dict[str, Any]:
        return next(self._stream)

    def __getitem__(self, index: Any) -> Any:
        return [token_batch(2, seed=seed) for seed in range(8)][index]

    def __len__(self) -> int:
        return 8


def base_model() -> PreTrainedModel:
    return tiny_llama()


def adapted_model(rank: int = 8) -> PeftModel:
    return get_peft_model(base_model(), LoraConfig(r=rank, lora_alpha=2 * rank, **TARGETS))


def optimizer_of(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)


def rows(count: int = 16) -> Dataset:
    tokens = [token_batch(1, seed=seed)["input_ids"][0].tolist() for seed in range(count)]
    return Dataset.from_dict({"input_ids": tokens, "labels": tokens})


def arguments(**changes: Any) -> TrainingArguments:
    settings = {
        "output_dir": "out",
        "max_steps": 8,
        "per_device_train_batch_size": 2,
        "report_to": [],
        "disable_tqdm": True,
        "save_strategy": "no",
        "use_cpu": True,
    }
    return TrainingArguments(**{**settings, **changes})


def save_base(folder: str = "base") -> Path:
    """The base model's folder, for blocks that load it."""
    base_model().save_pretrained(folder)
    return Path(folder)


__all__ = [
    "VOCABULARY",
    "Batches",
    "adapted_model",
    "arguments",
    "base_model",
    "optimizer_of",
    "rows",
    "save_base",
    "token_batch",
]
