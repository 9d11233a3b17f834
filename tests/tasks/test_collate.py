"""Batches: shapes, sides and what padding is filled with."""

import torch

from lorank.tasks.collate import IGNORED, Collator

SHORT = {"input_ids": [5], "attention_mask": [1], "labels": [5]}
LONG = {"input_ids": [6, 7, 8], "attention_mask": [1, 1, 1], "labels": [IGNORED, 7, 8]}


def test_training_batches_are_padded_on_the_right() -> None:
    batch = Collator(pad_token_id=9)([SHORT, LONG])
    assert batch["input_ids"].tolist() == [[5, 9, 9], [6, 7, 8]]
    assert batch["attention_mask"].tolist() == [[1, 0, 0], [1, 1, 1]]
    assert batch["labels"].tolist() == [[5, IGNORED, IGNORED], [IGNORED, 7, 8]]


def test_prompts_are_padded_on_the_left() -> None:
    batch = Collator(pad_token_id=9, side="left")([SHORT, LONG])
    assert batch["input_ids"].tolist() == [[9, 9, 5], [6, 7, 8]]
    assert batch["attention_mask"].tolist() == [[0, 0, 1], [1, 1, 1]]


def test_a_class_is_one_number_per_example() -> None:
    batch = Collator(pad_token_id=0)([{"input_ids": [1, 2], "labels": 3}, {"input_ids": [1], "labels": 0}])
    assert torch.equal(batch["labels"], torch.tensor([3, 0]))
