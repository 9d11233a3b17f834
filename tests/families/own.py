"""Modules of one's own, and Sentence-Transformers."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tests.families import own_modules
from tests.families.encoders import SIZE
from tests.families.family import Family, built, next_token, tokens

FILE = str(Path(own_modules.__file__).resolve())


def _own(kind: type[own_modules.Own], modules: list[str]) -> Family:
    return Family(
        "next token",
        kind.seeded,
        lambda n: {key: value for key, value in next_token(n).items() if key != "attention_mask"},
        modules,
        auto=f"{FILE}:{kind.__name__}",
    )


def sentence_transformer() -> nn.Module:
    """A tiny BERT with mean pooling, with the tokeniser of words that other tests use."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    from tests.training.test_trainer_callback import word_tokenizer

    with tempfile.TemporaryDirectory() as folder:
        built("BertConfig", "BertModel", **SIZE)().save_pretrained(folder)
        word_tokenizer().save_pretrained(folder)
        return SentenceTransformer(modules=[Transformer(folder), Pooling(32)], device="cpu")


def sentences(rows: int) -> dict[str, Tensor]:
    ids = tokens(rows)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def pulled_to_their_shifts(model: nn.Module, batch: Any) -> Tensor:
    """Each text is to be nearer to itself without its last tokens than to the others."""
    whole = model(dict(batch))["sentence_embedding"]  # (n, 32)
    part = model({key: value[:, :6] for key, value in batch.items()})["sentence_embedding"]
    return nn.functional.cross_entropy(whole @ part.T, torch.arange(len(whole)))


OWN: dict[str, Family] = {
    "nn.Module, a perceptron": _own(own_modules.Perceptron, ["first", "second", "out"]),
    "nn.Module with attention": _own(own_modules.Attentive, ["q_proj", "k_proj", "v_proj", "o_proj"]),
    "Sentence-Transformers": Family(
        "similar texts",
        sentence_transformer,
        sentences,
        ["query", "key", "value", "dense"],
        output="last_hidden_state",
        inner=lambda model: model[0].auto_model,
        loss_fn=pulled_to_their_shifts,
    ),
}
