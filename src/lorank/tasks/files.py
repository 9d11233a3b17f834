"""Reading rows from files: JSON lines, CSV and plain text, each also gzipped.

Why not `load_dataset("json")` of datasets: it needs pyarrow and pandas even for plain files, copies every file to a
cache, gives every row the columns of all rows, and reports a line that is not JSON only as "An error occurred while
generating the dataset".
"""

import csv
import gzip
import io
import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorank.tasks.errors import DataError

SUFFIXES = (".jsonl.gz", ".jsonl", ".csv.gz", ".csv", ".txt.gz", ".txt")


def read_file(path: Path) -> list[Mapping[str, Any]]:
    """The rows of one file. Plain text gives one row per paragraph (text between blank lines), in a column `text`.

    Raises:
        DataError: the file's kind is unknown, or the file is truncated, not UTF-8, or not of the kind that its name
            says.
    """
    if not path.name.endswith(SUFFIXES):
        raise DataError(f"{path}: the name of a data file must end in one of {', '.join(SUFFIXES)}.")
    try:
        raw = path.read_bytes()
        text = (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode("utf-8-sig")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as UTF-8 text ({error}). Fetch or write the file again.") from error
    kind = path.name.removesuffix(".gz").rpartition(".")[2]
    if kind == "jsonl":
        return _json_lines(path, text)
    if kind == "csv":
        return list(csv.DictReader(io.StringIO(text, newline="")))
    return [{"text": part} for part in text.replace("\r\n", "\n").split("\n\n") if part.strip()]


def _json_lines(path: Path, text: str) -> list[Mapping[str, Any]]:
    rows: list[Mapping[str, Any]] = []
    # not splitlines(): that also cuts at U+2028, which JSON strings may hold
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(
                f"{path}, line {number}: not JSON ({error}). Every line must be one JSON object."
            ) from error
        if not isinstance(row, dict):
            raise DataError(
                f"{path}, line {number}: found a JSON {type(row).__name__}. Each line must be one JSON object."
            )
        rows.append(row)
    return rows
