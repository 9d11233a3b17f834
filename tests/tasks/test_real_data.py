"""The real data sets, where LORANK_DATA points at them."""

import os
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from lorank.experiments.models import resolve
from lorank.tasks import ClassificationSettings, ClassificationTask, GenerationSettings, GenerationTask
from lorank.tasks.collate import IGNORED

FOLDER = os.environ.get("LORANK_DATA", "")


@pytest.fixture(autouse=True)
def real_data(no_data_folder: None, monkeypatch: pytest.MonkeyPatch) -> None:
    if not Path(FOLDER, "e2e_nlg").is_dir():
        pytest.skip("LORANK_DATA does not point at a folder with the data sets (e2e_nlg, rotten_tomatoes, clinc150)")
    monkeypatch.setenv("LORANK_DATA", FOLDER)


@pytest.mark.parametrize(
    ("data", "labels", "sizes"),
    [
        ("rotten_tomatoes", 2, (8530, 1066, 1066)),
        ("clinc150", 150, (15000, 3000, 4500)),
        ("banking77", 77, (9002, 1001, 3080)),
    ],
)
def test_classification(tokenizer: Any, data: str, labels: int, sizes: tuple[int, int, int]) -> None:
    task = ClassificationTask(ClassificationSettings(data=data), tokenizer)
    assert len(task.label_names) == labels
    assert (len(task.train), len(task.validation), len(task.test)) == sizes
    # the first 32 are what ranks are scored on: a fair sample, though the file is sorted by label
    assert len({example["labels"] for example in task.validation[:32]}) >= min(labels, 16)


def test_gsm8k() -> None:
    tokenizer = AutoTokenizer.from_pretrained(resolve("tiny"))
    task = GenerationTask(GenerationSettings(data="gsm8k", max_length=96), tokenizer)
    assert (len(task.train) + len(task.validation), len(task.test)) == (7473, 1319)
    assert 0.05 < len(task.validation) / 7473 < 0.15
    text = tokenizer.decode(task.train[0]["input_ids"])
    assert "Question:" in text or len(task.train[0]["input_ids"]) == 96  # a prompt that is too long is cut


def test_e2e() -> None:
    tokenizer = AutoTokenizer.from_pretrained(resolve("tiny"))  # tells all prompts apart, as the one of words does not
    task = GenerationTask(GenerationSettings(data="e2e_nlg"), tokenizer)
    assert len(task.train) + len(task.validation) == 4672
    assert 0.15 < len(task.validation) / 4672 < 0.25
    assert len(task.test) == 4693

    def prompt(example: Any) -> tuple[int, ...]:
        return tuple(t for t, label in zip(example["input_ids"], example["labels"], strict=True) if label == IGNORED)

    assert not set(map(prompt, task.train)) & set(map(prompt, task.validation))
