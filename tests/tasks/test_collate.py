"""Batches: shapes, sides and what padding is filled with."""

from typing import Any

import pytest
import torch
from transformers import DataCollatorForSeq2Seq, DataCollatorWithPadding, PreTrainedTokenizerFast

from lorank.tasks import DataError
from lorank.tasks.collate import IGNORED, padding_tokenizer

SHORT = {"input_ids": [5], "attention_mask": [1], "labels": [5]}
LONG = {"input_ids": [6, 7, 8], "attention_mask": [1, 1, 1], "labels": [IGNORED, 7, 8]}


def test_training_batches_are_padded_on_the_right(tokenizer: Any) -> None:
    end = tokenizer.eos_token_id
    batch = DataCollatorForSeq2Seq(padding_tokenizer(tokenizer))([SHORT, LONG])
    assert batch["input_ids"].tolist() == [[5, end, end], [6, 7, 8]]
    assert batch["attention_mask"].tolist() == [[1, 0, 0], [1, 1, 1]]
    assert batch["labels"].tolist() == [[5, IGNORED, IGNORED], [IGNORED, 7, 8]]


def test_prompts_are_padded_on_the_left(tokenizer: Any) -> None:
    end = tokenizer.eos_token_id
    prompts = [{key: example[key] for key in ("input_ids", "attention_mask")} for example in (SHORT, LONG)]
    batch = DataCollatorWithPadding(padding_tokenizer(tokenizer, "left"))(prompts)
    assert batch["input_ids"].tolist() == [[end, end, 5], [6, 7, 8]]
    assert batch["attention_mask"].tolist() == [[0, 0, 1], [1, 1, 1]]


def test_a_class_is_one_number_per_example(tokenizer: Any) -> None:
    examples = [{"input_ids": [1, 2], "labels": 3}, {"input_ids": [1], "labels": 0}]
    batch = DataCollatorWithPadding(padding_tokenizer(tokenizer))(examples)
    assert torch.equal(batch["labels"], torch.tensor([3, 0]))


def test_the_tokenizer_of_the_user_stays_as_it_is(tokenizer: Any) -> None:
    sides = tokenizer.padding_side
    padding = padding_tokenizer(tokenizer, "left")
    assert (padding.pad_token_id, padding.padding_side) == (tokenizer.eos_token_id, "left")
    assert (tokenizer.pad_token, tokenizer.padding_side) == (None, sides)


def test_a_padding_token_of_its_own_is_taken(tokenizer: Any) -> None:
    own = padding_tokenizer(tokenizer)
    own.pad_token = "["
    assert padding_tokenizer(own).pad_token_id == tokenizer.convert_tokens_to_ids("[")


def test_without_either_token_there_is_an_error(tokenizer: Any) -> None:
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, unk_token="<unk>")
    with pytest.raises(DataError, match="neither a padding nor an end-of-text token"):
        padding_tokenizer(bare)
