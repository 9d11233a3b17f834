"""Reading the rows of a data set from a path, the folder LORANK_DATA, the Hugging Face hub, or lorank itself.

Searched in this order: the known names that are on no hub (`python_reference`, `classics`, `facts`, `digits`); an
existing path; a folder of this name inside the folder given by the environment variable LORANK_DATA; the hub. lorank
copies no data (the hub's client has its own cache).
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorank.extras import require
from lorank.tasks.classics import read_classics
from lorank.tasks.digits import load_digits_split
from lorank.tasks.errors import DataError
from lorank.tasks.facts import read_facts
from lorank.tasks.files import SUFFIXES, read_file
from lorank.tasks.known import KNOWN, nearest_name

Row = Mapping[str, Any]


def load_rows(data: str, split: str, *, subset: str | None = None) -> list[Row]:
    """All rows of one split, in the order in which they are stored.

    Args:
        data: a known name, a path, the name of a folder in LORANK_DATA, or a hub name (see `DataSettings.data`).
        split: the split's name; a single file has only the split "train".
        subset: the configuration name of a hub data set that has several configurations; the number of `facts`.

    Raises:
        DataError: the folder, file, data set or split does not exist, is empty or cannot be read.
    """
    rows = _load(data, split, subset)
    known = KNOWN.get(data)
    if known and known.drop:
        column, value = known.drop
        rows = [row for row in rows if row.get(column) != value]
    if not rows:
        raise DataError(f"Data set {data!r}: the split {split!r} has no rows. Check its file, or name another split.")
    return rows


def _load(data: str, split: str, subset: str | None) -> list[Row]:
    if data == "python_reference":
        return _python_reference(split)
    if data == "classics":
        return list(read_classics(split))
    if data == "facts":
        return list(read_facts(split, subset))
    if data == "digits":
        return load_digits_split(split)
    path = Path(data).expanduser()
    if path.exists():
        return _from_path(path, split)
    if path.is_absolute() or data.startswith((".", "~")) or data.endswith(SUFFIXES):
        raise DataError(f"Data {data!r}: there is no such file or folder. Paths are relative to {Path.cwd()}.")
    folder = os.environ.get("LORANK_DATA")
    if folder:
        if not Path(folder).is_dir():
            raise DataError(f"LORANK_DATA is {folder!r}, which is not a folder. Correct it or unset it to use the hub.")
        if (Path(folder) / data).is_dir():
            return _from_path(Path(folder) / data, split)
    return _from_hub(data, split, subset)


def _from_path(path: Path, split: str) -> list[Row]:
    if path.is_file():
        if split != "train":
            raise DataError(
                f"{path} is a single file and has only the split 'train', not {split!r}. "
                "Set holdout (0.1, for example) for validation and test_split: null, or give a folder with split files."
            )
        return read_file(path)
    for suffix in SUFFIXES:
        file = path / f"{split}{suffix}"
        if file.is_file():
            return read_file(file)
    there = sorted(
        {file.name.removesuffix(suffix) for file in path.iterdir() for suffix in SUFFIXES if file.name.endswith(suffix)}
    )
    raise DataError(
        f"Data folder {path}: there is no split {split!r} (a file {split}.jsonl.gz, .jsonl, .csv or .txt). "
        f"Its splits are {', '.join(there) or 'none'}. Name one as train_split, validation_split or test_split, "
        "or set holdout instead of a validation split."
    )


def _from_hub(data: str, split: str, subset: str | None) -> list[Row]:
    require(f"the data set {data!r}, from the Hugging Face hub,", "datasets")
    import datasets  # slow

    known = KNOWN.get(data)
    address = known.hub if known and known.hub else data
    subset = subset or (known.subset if known else None)
    try:
        try:
            table = datasets.load_dataset(address, subset, split=split)
        except RuntimeError as error:
            # older data sets are scripts, which `datasets` 4 no longer runs; the hub has a converted copy of each
            if "scripts are no longer supported" not in str(error):
                raise
            table = datasets.load_dataset(address, subset, split=split, revision="refs/convert/parquet")
    except Exception as error:  # the hub's client raises errors of four libraries; the error is kept as the cause
        folder = os.environ.get("LORANK_DATA")
        searched = f"It is not a folder in LORANK_DATA ({folder}) either." if folder else "LORANK_DATA is not set."
        near = nearest_name(data)
        meant = f" Did you mean {near!r}?" if near else ""
        raise DataError(
            f"Data set {data!r}, split {split!r}: there is no such path, and loading {address!r} from the Hugging Face "
            f"hub failed ({type(error).__name__}: {_first_line(error)}). {searched} Check the name and the "
            f"connection, or give the path of a file or folder.{meant}"
        ) from error
    names = {
        column: feature.names for column, feature in table.features.items() if isinstance(feature, datasets.ClassLabel)
    }
    return [_with_label_names(row, names) for row in table]


def _with_label_names(row: Mapping[str, Any], names: Mapping[str, list[str]]) -> Row:
    """Adds `<column>_name` for every column of class numbers. A row without a label has −1 and gets no name."""
    added = {f"{column}_name": words[row[column]] for column, words in names.items() if (row[column] or 0) >= 0}
    return {**row, **added}


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or ["no message"])[0]


def _python_reference(split: str) -> list[Row]:
    """Python's reference manual, part of every Python installation: one row per topic, columns topic and text.

    Its text differs a little between Python versions. Of every ten topics in alphabetical order, the ninth is for
    validation and the tenth for the test.
    """
    from pydoc_data.topics import topics

    parts: dict[str, list[Row]] = {"train": [], "validation": [], "test": []}
    for index, name in enumerate(sorted(topics)):
        part = {8: "validation", 9: "test"}.get(index % 10, "train")
        parts[part].append({"topic": name, "text": topics[name]})
    if split not in parts:
        raise DataError(f"Data set 'python_reference' has the splits train, validation and test, not {split!r}.")
    return parts[split]
