"""Classification: labels, pairs, parts, accuracy against a count by hand."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForSequenceClassification

from lorank.tasks import ClassificationSettings, ClassificationTask, DataError
from tests.tasks.one_at_a_time import check_metrics

ROWS = [{"text": f"{word} film", "label": label} for word, label in [("good", 7), ("bad", 3)] * 10]


@pytest.fixture
def folder(tmp_path: Path, write_rows: Any) -> Path:
    for split in ("train", "validation", "test"):
        write_rows(tmp_path / f"{split}.jsonl", ROWS)
    return tmp_path


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, pad_token_id=2
    )
    config.num_labels = 2
    return LlamaForSequenceClassification(config)


def test_labels_are_numbered_in_their_order(folder: Path, tokenizer: Any) -> None:
    task = ClassificationTask(ClassificationSettings(data=str(folder)), tokenizer)
    assert task.label_names == ("3", "7")
    by_text = {tokenizer.decode(e["input_ids"], skip_special_tokens=True): e["labels"] for e in task.train}
    assert by_text == {"good film": 1, "bad film": 0}


def test_labels_may_be_words_and_text_may_be_a_pair(tmp_path: Path, tokenizer: Any, write_rows: Any) -> None:
    rows = [{"a": "good", "b": "film", "kind": "yes"}, {"a": "bad", "b": "plot", "kind": "no"}] * 3
    file = write_rows(tmp_path / "rows.jsonl", rows)
    settings = ClassificationSettings(
        data=str(file), template="very {a}", second="{b}", label="kind", holdout=0.3, test_split=None
    )
    task = ClassificationTask(settings, tokenizer)
    assert task.label_names == ("no", "yes")
    texts = {tokenizer.decode(e["input_ids"], skip_special_tokens=True) for e in [*task.train, *task.validation]}
    assert texts == {"very good film", "very bad plot"}
    assert not task.has_test
    with pytest.raises(DataError, match="no test split is configured"):
        _ = task.test


def test_limits_and_length(folder: Path, tokenizer: Any) -> None:
    settings = ClassificationSettings(data=str(folder), max_train=5, max_eval=3, max_length=2)
    task = ClassificationTask(settings, tokenizer)
    assert (len(task.train), len(task.validation), len(task.test)) == (5, 3, 3)
    assert all(len(example["input_ids"]) == 2 for example in task.train)


def test_accuracy_and_loss_agree_with_one_example_at_a_time(folder: Path, tokenizer: Any, model: nn.Module) -> None:
    task = ClassificationTask(ClassificationSettings(data=str(folder)), tokenizer)
    check_metrics(task, model)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label": "lable"}, r"no column 'lable'.*'text', 'label'"),
        ({"template": "{sentence}"}, "no column 'sentence'"),
        ({"label": "score"}, "neither a whole number nor a string"),
        ({"label": "constant"}, "expected at least two labels"),
        ({"test_split": "hidden"}, "-1"),
    ],
)
def test_columns_that_do_not_fit(
    tmp_path: Path, write_rows: Any, tokenizer: Any, change: dict[str, Any], message: str
) -> None:
    rows = [{**row, "score": 0.5, "constant": 1} for row in ROWS]
    write_rows(tmp_path / "train.jsonl", rows)
    write_rows(tmp_path / "hidden.jsonl", [{**row, "label": -1} for row in rows])
    settings = ClassificationSettings(data=str(tmp_path), **{"holdout": 0.2, **change})
    with pytest.raises(DataError, match=message):
        _ = ClassificationTask(settings, tokenizer).test
