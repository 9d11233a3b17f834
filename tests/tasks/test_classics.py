"""The books of the packaged Llama: whole books in every split, and what is said where they are not."""

import gzip
import os
from pathlib import Path

import pytest

from lorank.tasks import DataError, load_rows
from lorank.tasks.classics import TEST, VALIDATION

REAL = Path(os.environ.get("LORANK_DATA", ""), "classics", "corpus.txt.gz")


def book(title: str, text: str = "Once.\n\nTwice.") -> str:
    return f"Title: {title}\n\nAuthor: Nobody\n\n{text}\n\n"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LORANK_DATA", str(tmp_path))
    (tmp_path / "classics").mkdir()
    return tmp_path / "classics" / "corpus.txt.gz"


def test_the_two_books_that_the_llama_has_not_seen_are_held_out(folder: Path) -> None:
    folder.write_bytes(gzip.compress("".join(map(book, ["One", VALIDATION, "Two", TEST])).encode()))
    titles = {s: [row["title"] for row in load_rows("classics", s)] for s in ("train", "validation", "test")}
    assert titles == {"train": ["One", "Two"], "validation": [VALIDATION], "test": [TEST]}
    assert load_rows("classics", "train")[1]["text"] == book("Two").strip() + "\n"


def test_the_held_out_books_are_those_of_pretraining() -> None:
    card = Path(__file__).parents[2] / "src/lorank/assets/tiny_llama/MODEL_CARD.md"
    assert f"*{VALIDATION}* and *{TEST}*" in card.read_text()


def test_real_splits_share_no_paragraph(monkeypatch: pytest.MonkeyPatch) -> None:
    if not REAL.is_file():
        pytest.skip("LORANK_DATA does not point at a folder with classics/corpus.txt.gz")
    monkeypatch.setenv("LORANK_DATA", str(REAL.parents[1]))
    train, validation, test = (
        # short ones, such as "CHAPTER I", are in many books
        {p for row in load_rows("classics", split) for p in row["text"].split("\n\n") if len(p) > 80}
        for split in ("train", "validation", "test")
    )
    assert min(len(train), len(validation), len(test)) > 100
    assert not train & validation
    assert not train & test
    assert not validation & test


def test_without_the_books(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match=r"'classics' is a folder of LORANK_DATA, and it is not set"):
        load_rows("classics", "train")
    monkeypatch.setenv("LORANK_DATA", str(tmp_path))
    with pytest.raises(DataError, match=r"there is no .*corpus\.txt\.gz"):
        load_rows("classics", "train")


def test_other_splits_and_other_books(folder: Path) -> None:
    with pytest.raises(DataError, match=r"train, validation and test, not 'dev'"):
        load_rows("classics", "dev")
    folder.write_bytes(gzip.compress(book("One").encode()))
    with pytest.raises(DataError, match="the corpus needs 'Through the Looking-Glass'"):
        load_rows("classics", "train")
