"""Where rows come from: files of each kind, LORANK_DATA, Python itself, the hub; and what is said when they do not."""

import gzip
from pathlib import Path
from typing import Any

import datasets
import pytest

from lorank.tasks import DataError, load_rows

ROWS = [{"text": "good film", "label": 1}, {"text": "bad film", "label": 0}]


@pytest.mark.parametrize("name", ["train.jsonl", "train.jsonl.gz"])
def test_a_folder_gives_its_split(tmp_path: Path, write_rows: Any, name: str) -> None:
    write_rows(tmp_path / name, ROWS)
    assert load_rows(str(tmp_path), "train") == ROWS


def test_csv_and_text_files(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text('text,label\n"good, film",1\n')
    (tmp_path / "test.txt.gz").write_bytes(gzip.compress(b"one\nparagraph\n\n\nanother\n"))
    assert load_rows(str(tmp_path), "train") == [{"text": "good, film", "label": "1"}]
    assert load_rows(str(tmp_path), "test") == [{"text": "one\nparagraph"}, {"text": "\nanother\n"}]


def test_a_json_string_may_hold_a_line_separator(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"text": "a\u2028b"}\n', encoding="utf-8")
    assert load_rows(str(file), "train") == [{"text": "a\u2028b"}]


def test_lorank_data_comes_before_the_hub(tmp_path: Path, write_rows: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    write_rows(tmp_path / "rotten_tomatoes" / "train.jsonl.gz", ROWS)
    monkeypatch.setenv("LORANK_DATA", str(tmp_path))
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: pytest.fail("the hub was asked"))
    assert load_rows("rotten_tomatoes", "train") == ROWS


def test_python_reference_has_three_disjoint_splits() -> None:
    topics = [{row["topic"] for row in load_rows("python_reference", s)} for s in ("train", "validation", "test")]
    assert sum(map(len, topics)) == len(set.union(*topics)) > 50
    with pytest.raises(DataError, match="'dev'"):
        load_rows("python_reference", "dev")


def hub_table(rows: list[dict[str, Any]], **features: Any) -> datasets.Dataset:
    return datasets.Dataset.from_list(rows, features=datasets.Features(features))


def test_the_hub_is_asked_for_the_known_address(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    intents = datasets.ClassLabel(names=["book", "oos", "cancel"])
    table = hub_table(
        [{"text": "a", "intent": 0}, {"text": "b", "intent": 1}, {"text": "c", "intent": 2}],
        text=datasets.Value("string"),
        intent=intents,
    )

    def load(*args: Any, **kwargs: Any) -> datasets.Dataset:
        asked.append((args, kwargs))
        return table

    monkeypatch.setattr(datasets, "load_dataset", load)
    rows = load_rows("clinc150", "train")
    assert asked == [(("clinc/clinc_oos", "plus"), {"split": "train"})]
    # the out-of-scope class of the hub's copy is left out, and the labels' names are there
    assert [(row["intent"], row["intent_name"]) for row in rows] == [(0, "book"), (2, "cancel")]


def test_a_script_on_the_hub_is_read_from_its_converted_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*args: Any, revision: str | None = None, **kwargs: Any) -> datasets.Dataset:
        if revision is None:
            raise RuntimeError("Dataset scripts are no longer supported, but found e2e_nlg.py")
        assert revision == "refs/convert/parquet"
        return hub_table([{"text": "a"}], text=datasets.Value("string"))

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert load_rows("owner/name", "train") == [{"text": "a"}]


def test_a_hub_that_does_not_answer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def load(*args: Any, **kwargs: Any) -> datasets.Dataset:
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(DataError, match=r"'owner/x' .*hub failed \(ConnectionError: no route\).*DATA is not"):
        load_rows("owner/x", "train")
    monkeypatch.setenv("LORANK_DATA", str(tmp_path))
    with pytest.raises(DataError, match="not a folder in LORANK_DATA"):
        load_rows("owner/x", "train")


def test_a_path_that_is_not_there(tmp_path: Path) -> None:
    for data in (str(tmp_path / "nowhere"), "./nowhere", "nowhere.jsonl"):
        with pytest.raises(DataError, match="no such file or folder"):
            load_rows(data, "train")


def test_lorank_data_that_is_not_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORANK_DATA", str(tmp_path / "gone"))
    with pytest.raises(DataError, match=r"LORANK_DATA is .*gone.*not a folder"):
        load_rows("rotten_tomatoes", "train")


def test_a_split_that_is_not_there_names_those_that_are(tmp_path: Path, write_rows: Any) -> None:
    write_rows(tmp_path / "test.jsonl.gz", ROWS)
    write_rows(tmp_path / "validation.jsonl", ROWS)
    with pytest.raises(DataError, match=r"no split 'train'.*test, validation"):
        load_rows(str(tmp_path), "train")


def test_a_single_file_has_one_split(tmp_path: Path, write_rows: Any) -> None:
    file = write_rows(tmp_path / "rows.jsonl", ROWS)
    assert load_rows(str(file), "train") == ROWS
    with pytest.raises(DataError, match="holdout"):
        load_rows(str(file), "validation")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.jsonl", b"", "no rows"),
        ("rows.jsonl", b'{"text": 1}\n{oops}\n', "line 2: not JSON"),
        ("rows.jsonl", b"[1, 2]\n", "line 1: found a JSON list"),
        ("rows.jsonl", b'{"text": "\xff"}\n', "cannot be read as UTF-8"),
        ("rows.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 1000, mtime=0)[:30], "cannot be read"),
        ("rows.jsonl.gz", b"not gzip", "cannot be read"),
        ("rows.parquet", b"PAR1", "must end in one of"),
    ],
)
def test_damaged_files(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        load_rows(str(tmp_path / name), "train")


def test_unlabelled_rows_of_the_hub_get_no_name(monkeypatch: pytest.MonkeyPatch) -> None:
    # ClassLabel columns hold −1 where a test split keeps its labels back; Features refuse to store it, so a stand-in
    table = [{"text": "a", "label": -1}]
    features = {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["neg", "pos"])}
    stand_in = type("Table", (list,), {"features": features})(table)
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: stand_in)
    assert load_rows("owner/x", "test") == table
