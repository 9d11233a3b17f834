"""Invented facts: every fact in every split, and every split in its own words."""

import re
import subprocess
import sys
from typing import Any

import pytest
from transformers import AutoTokenizer

from lorank.experiments.models import resolve
from lorank.tasks import DataError, GenerationSettings, GenerationTask, load_rows
from lorank.tasks.facts import ADJECTIVES, DEFAULT, MOST, NOUNS, VALUES

SPLITS = ("train", "validation", "test")
KEY = re.compile(rf"the ((?:{'|'.join(ADJECTIVES)}) (?:{'|'.join(NOUNS)}))$")


def key(row: Any) -> str:
    found = KEY.search(row["prompt"])
    assert found
    return found[1]


@pytest.mark.parametrize("number", [1, 100, MOST])
def test_every_fact_is_in_every_split(number: int) -> None:
    facts = [{key(row): row["value"] for row in load_rows("facts", s, subset=str(number))} for s in SPLITS]
    assert facts[0] == facts[1] == facts[2]
    assert len(facts[0]) == number


def test_training_has_four_phrasings_and_the_others_one_of_their_own() -> None:
    phrasings = [
        {row["prompt"].replace(key(row), "…") for row in load_rows("facts", split, subset="100")} for split in SPLITS
    ]
    assert [len(part) for part in phrasings] == [4, 1, 1]
    assert len(set.union(*phrasings)) == 6
    assert [len(load_rows("facts", split, subset="100")) for split in SPLITS] == [400, 100, 100]


def test_a_smaller_number_is_part_of_a_larger_one() -> None:
    assert load_rows("facts", "test", subset="300")[:200] == load_rows("facts", "test", subset="200")


def test_neither_word_of_a_key_tells_the_value() -> None:
    rows = load_rows("facts", "test", subset=str(MOST))
    for position in (0, 1):
        by_word: dict[str, list[str]] = {}
        for row in rows:
            by_word.setdefault(key(row).split()[position], []).append(row["value"])
        # the commonest value of each word, as a guess: with 24 or 40 values of each word, 3 to 6 hit by chance
        hits = sum(max(map(values.count, values)) for values in by_word.values())
        assert hits / len(rows) < 0.2
    assert {row["value"] for row in rows} == set(VALUES)


def test_another_process_makes_the_same_facts() -> None:
    code = "from lorank.tasks import load_rows; print(load_rows('facts', 'test', subset='50'))"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == str(load_rows("facts", "test", subset="50"))


def test_the_task_has_a_loss_on_the_value_alone() -> None:
    tokenizer = AutoTokenizer.from_pretrained(resolve("tiny"))
    task = GenerationTask(GenerationSettings(data="facts", subset=20), tokenizer)  # type: ignore[arg-type]  # as in YAML
    assert [len(part) for part in (task.train, task.validation)] == [80, 20]
    labels = [[token for token in example["labels"] if token >= 0] for example in task.validation]
    # one token and the end of the text, so that the loss is that of one choice
    assert all(len(tokens) == 2 and tokens[1] == tokenizer.eos_token_id for tokens in labels)
    assert {tokenizer.decode(tokens[:1]).strip() for tokens in labels} <= set(VALUES)


def test_without_a_number() -> None:
    assert GenerationSettings(data="facts").subset == str(DEFAULT)
    assert load_rows("facts", "test") == load_rows("facts", "test", subset=str(DEFAULT))


@pytest.mark.parametrize("number", ["0", "-1", "ten", "", "1.5", str(MOST + 1), "²"])
def test_a_number_that_is_none(number: str) -> None:
    with pytest.raises(DataError, match=f"from 1 to {MOST}"):
        load_rows("facts", "train", subset=number)


def test_a_split_that_is_not_there() -> None:
    with pytest.raises(DataError, match="train, validation and test, not 'dev'"):
        load_rows("facts", "dev")
