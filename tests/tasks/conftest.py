"""A tokenizer of whole words and data files of a few rows: everything a task needs, made in milliseconds."""

import gzip
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

WORDS = ["good", "bad", "film", "very", "name", "Alimentum", "food", "Indian", "area", "centre", "in", "the", "a", "is"]
WORDS += ["restaurant", "plot"]


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """Whole words; <s> before every text, </s> ends a text, no padding token (as Llama's)."""
    from tokenizers.processors import TemplateProcessing

    vocabulary = {word: number for number, word in enumerate(["<unk>", "<s>", "</s>", "[", "]", ":", ",", ".", *WORDS])}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    raw.post_processor = TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", vocabulary["<s>"])]
    )
    return PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


@pytest.fixture(autouse=True)
def no_data_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests do not depend on the user's environment; those that need the real data ask for `real_data`."""
    monkeypatch.delenv("LORANK_DATA", raising=False)


@pytest.fixture
def write_rows() -> Callable[[Path, Iterable[Mapping[str, Any]]], Path]:
    """Writes rows as JSON lines, gzipped if the name ends so."""

    def write(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        text = "".join(json.dumps(row) + "\n" for row in rows).encode()
        path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
        return path

    return write
