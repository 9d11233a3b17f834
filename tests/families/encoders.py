"""Encoders of text: BERT for each of its tasks, and its relatives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.families.family import VOCABULARY, Family, built, span, tokens

SIZE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 1,
}


def _labelled(make_labels: Callable[[int], Tensor]) -> Callable[[int], dict[str, Tensor]]:
    return lambda rows: {"input_ids": tokens(rows), "labels": make_labels(rows)}


def pairs(rows: int) -> dict[str, Tensor]:
    """Two texts in one sequence, told apart by their token types."""
    types = torch.zeros(rows, 9, dtype=torch.long)
    types[:, 5:] = 1
    return {"input_ids": tokens(rows), "token_type_ids": types, "labels": torch.arange(rows) % 3}


def choices(rows: int) -> dict[str, Tensor]:
    """Two continuations of each text."""
    return {"input_ids": tokens(rows * 2).view(rows, 2, 9), "labels": torch.arange(rows) % 2}


def classes(rows: int) -> Tensor:
    return torch.arange(rows) % 3


def _classifier(name: str, modules: list[str] | str = "all-linear", **changes: Any) -> Family:
    make = built(f"{name}Config", f"{name}ForSequenceClassification", **{**SIZE, "num_labels": 3, **changes})
    return Family("one class per text", make, _labelled(classes), modules, lora={"task_type": "SEQ_CLS"})


def _bert(task: str, head: str, batch: Callable[[int], dict[str, Tensor]], **changes: Any) -> Family:
    output = "start_logits" if head == "QuestionAnswering" else "logits"
    return Family(task, built("BertConfig", f"BertFor{head}", **SIZE, **changes), batch, output=output)


ENCODERS: dict[str, Family] = {
    "BERT": _classifier("Bert"),
    "BERT, pairs": _bert("one class per pair", "SequenceClassification", pairs, num_labels=3),
    "BERT, tokens": _bert(
        "one class per token",
        "TokenClassification",
        lambda n: {"input_ids": tokens(n), "labels": tokens(n, first=0) % 5},
        num_labels=5,
    ),
    "BERT, spans": _bert("question answering", "QuestionAnswering", span),
    "BERT, one number": _bert(
        "regression", "SequenceClassification", _labelled(lambda n: torch.arange(n) / 3), num_labels=1
    ),
    "BERT, several labels": _bert(
        "several labels per text",
        "SequenceClassification",
        _labelled(lambda n: torch.stack([torch.arange(n) % k == 0 for k in (1, 2, 3)], 1).float()),
        num_labels=3,
        problem_type="multi_label_classification",
    ),
    "BERT, choices": _bert("multiple choice", "MultipleChoice", choices),
    "BERT, masked": _bert("masked tokens", "MaskedLM", lambda n: {"input_ids": tokens(n), "labels": tokens(n, seed=1)}),
    "RoBERTa": _classifier("Roberta"),
    "XLM-RoBERTa": _classifier("XLMRoberta"),
    "DeBERTa-v2": _classifier(
        "DebertaV2", relative_attention=True, pos_att_type=["p2c", "c2p"], position_buckets=8, type_vocab_size=0
    ),
    "DistilBERT": Family(
        "one class per text",
        built(
            "DistilBertConfig",
            "DistilBertForSequenceClassification",
            vocab_size=VOCABULARY,
            dim=32,
            hidden_dim=48,
            n_layers=2,
            n_heads=4,
            max_position_embeddings=64,
            num_labels=3,
        ),
        _labelled(classes),
        ["q_lin", "v_lin", "out_lin", "lin1", "lin2"],
        lora={"task_type": "SEQ_CLS"},
    ),
    "ELECTRA": _classifier("Electra", embedding_size=16),
    "ALBERT": _classifier("Albert", embedding_size=16),
    "ModernBERT": _classifier("ModernBert", local_attention=4, cls_token_id=3, sep_token_id=2),
}
