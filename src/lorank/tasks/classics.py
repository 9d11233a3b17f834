"""English books from the folder LORANK_DATA: the corpus of the packaged tiny Llama (see its model card).

The splits are whole books. The training split has the books that the packaged Llama was pretrained on. Validation and
test are the two books that neither it nor its tokenizer saw.
"""

import os
import re
from pathlib import Path

from lorank.tasks.errors import DataError
from lorank.tasks.files import read_file

VALIDATION, TEST = "Through the Looking-Glass", "The Happy Prince & Other Tales"
_HEADER = re.compile(r"(?m)^(?=Title: .*\n\nAuthor: )")


def read_classics(split: str) -> list[dict[str, str]]:
    """One row per book, in the order of the file; columns title and text (which begins with title and author).

    Args:
        split: train, validation or test.

    Raises:
        DataError: LORANK_DATA has no such corpus, it lacks one of the two held-out books, or there is no such split.
    """
    parts: dict[str, list[dict[str, str]]] = {"train": [], "validation": [], "test": []}
    if split not in parts:
        raise DataError(f"Data set 'classics' has the splits train, validation and test, not {split!r}.")
    for book in _books():
        title = book.split("\n", 1)[0].removeprefix("Title: ")
        part = {VALIDATION: "validation", TEST: "test"}.get(title, "train")
        parts[part].append({"title": title, "text": book})
    if not all(parts.values()):
        raise DataError(
            f"Data set 'classics': the corpus needs {VALIDATION!r} (validation), {TEST!r} (test) and other books "
            "(training). Give the corpus that the packaged model's card names, or another data set with its own splits."
        )
    return parts[split]


def _books() -> list[str]:
    folder = os.environ.get("LORANK_DATA")
    file = Path(folder or "", "classics", "corpus.txt.gz")
    if not folder or not file.is_file():
        problem = f"there is no {file}" if folder else "it is not set"
        raise DataError(
            f"Data set 'classics' is a folder of LORANK_DATA, and {problem}. "
            "The books are neither in lorank nor on the Hugging Face hub. Set LORANK_DATA to the folder that has "
            "classics/corpus.txt.gz, one text in which every book begins with 'Title: …', an empty line, 'Author: …'."
        )
    # paragraphs are rows of text files in general; here they become books again
    text = "\n\n".join(str(row["text"]) for row in read_file(file))
    return [book.strip() + "\n" for book in _HEADER.split(text) if book.strip()]
