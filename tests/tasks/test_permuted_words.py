"""A permuted vocabulary: a permutation of the training text's most frequent words, the same everywhere."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lorank.tasks import DataError, LanguageModellingSettings, LanguageModellingTask
from lorank.tasks.permuted_words import replace_words, word_permutation

TEXT = "The cat, the dog; the cat's dog: don't, don't! A naïve cat saw 12 cats."


def test_it_is_one_cycle_of_the_most_frequent_words() -> None:
    replacements = word_permutation([TEXT, "the the saw"], 5, 0, "here")
    # the 4, cat 2, dog 2, don't 2, saw 2: of equally frequent words, those that occur first
    assert set(replacements) == set(replacements.values()) == {"the", "cat", "dog", "don't", "saw"}
    word, seen = "the", []
    while word not in seen:
        seen.append(word)
        word = replacements[word]
    assert len(seen) == 5


def test_the_seed_decides_and_nothing_else() -> None:
    words = [f"w{chr(97 + i)}" for i in range(20)]
    assert word_permutation(words, 20, 0, "") == word_permutation(words, 20, 0, "")
    assert word_permutation(words, 20, 0, "") != word_permutation(words, 20, 1, "")


def test_another_process_makes_the_same_permutation() -> None:
    # Python's hashes of strings differ between processes, so an order that came from a set would too
    code = f"from lorank.tasks.permuted_words import *; print(word_permutation([{TEXT!r}], 8, 3, ''))"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == str(word_permutation([TEXT], 8, 3, ""))


def test_only_whole_words_change_and_the_rule_can_be_undone() -> None:
    replacements = {"the": "cat", "cat": "dog", "dog": "the"}
    changed = replace_words(TEXT, replacements)
    assert changed == "The dog, cat the; cat cat's the: don't, don't! A naïve dog saw 12 cats."
    assert replace_words(changed, {new: old for old, new in replacements.items()}) == TEXT


def test_too_few_words() -> None:
    with pytest.raises(DataError, match=r"here: permute_words is 20, .* only 2 different words"):
        word_permutation(["one two two"], 20, 0, "here")


def task_of(tmp_path: Path, tokenizer: Any, **settings: Any) -> LanguageModellingTask:
    for split, text in {
        "train": "the film is very good, the food in the area is bad",
        "validation": "the plot is bad bad bad bad bad",
        "test": "the restaurant is in the centre of Indian food",
    }.items():
        (tmp_path / f"{split}.txt").write_text(text)
    return LanguageModellingTask(LanguageModellingSettings(data=str(tmp_path), block_size=8, **settings), tokenizer)


def test_all_splits_have_the_permutation_of_the_training_text(tmp_path: Path, tokenizer: Any) -> None:
    task = task_of(tmp_path, tokenizer, permute_words=2)
    words = [tokenizer.decode(part[0]["input_ids"][:4]).split() for part in (task.train, task.validation, task.test)]
    # "the" and "is" are the most frequent words of the training text; "bad", of the validation text, stays
    assert words == [
        ["is", "film", "the", "very"],
        ["is", "plot", "the", "bad"],
        ["is", "restaurant", "the", "in"],
    ]


def test_without_it_the_text_stays(tmp_path: Path, tokenizer: Any) -> None:
    assert tokenizer.decode(task_of(tmp_path, tokenizer).test[0]["input_ids"]).startswith("the restaurant is in")


def test_more_words_than_there_are(tmp_path: Path, tokenizer: Any) -> None:
    with pytest.raises(DataError, match=r"split 'train': permute_words is 50, .* only 9 different"):
        task_of(tmp_path, tokenizer, permute_words=50)
