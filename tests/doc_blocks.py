"""The code blocks of the documentation: which there are, what a page says about how to run them, and running them.

A page's Python blocks run in order, in one namespace. Comments that readers do not see say what a block needs:

    <!-- setup: CODE -->             runs at this place of the page, for example `model = tests.doc_names.fresh()`
    <!-- with: 1000 = 8 -->          the next block runs with 8 in place of 1000
    <!-- not run: REASON -->         the next block is only shown
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_ITEM = re.compile(
    r"^<!-- setup:(?P<setup>.*?)-->|^<!-- with:(?P<with>[^>]*)-->|^<!-- not run:(?P<reason>[^>]*)-->"
    r"|^```(?P<language>\w*)\n(?P<code>.*?)^```|(?<=\n\n)(?P<indented>(?:    [^\n]*\n)+)",
    re.MULTILINE | re.DOTALL,
)
_PLACEHOLDER = re.compile(r"…|\b[A-Z][A-Z_]{2,}\b|\bmy/|\bruns/")


@dataclass(frozen=True)
class Block:
    """One block of code.

    Args:
        line: the number of its first line in the page.
        language: what stands behind the fence, ``setup`` for hidden code, or ``indented``.
        code: the text, as it is shown.
        replaced: what is replaced before it runs.
        skipped: why it is not run; None: it is run.
    """

    line: int
    language: str
    code: str
    replaced: tuple[tuple[str, str], ...] = ()
    skipped: str | None = None

    @property
    def to_run(self) -> str:
        code = self.code
        for old, new in self.replaced:
            assert old in code, f"line {self.line}: there is no {old!r} to replace"
            code = code.replace(old, new)
        return code


def blocks_of(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    found: list[Block] = []
    replaced: list[tuple[str, str]] = []
    skipped: str | None = None
    for item in _ITEM.finditer(text):
        line = text.count("\n", 0, item.start()) + 1
        if item["setup"] is not None:
            found.append(Block(line, "setup", item["setup"].strip()))
        elif item["with"] is not None:
            old, _, new = item["with"].strip().partition(" = ")
            replaced.append((old, new))
        elif item["reason"] is not None:
            skipped = item["reason"].strip()
        elif item["indented"] is not None:
            found.append(Block(line, "indented", item["indented"]))
        else:
            found.append(Block(line, item["language"], item["code"], tuple(replaced), skipped))
            replaced, skipped = [], None
    assert not replaced, f"{page.name}: nothing follows the last 'with'"
    assert skipped is None, f"{page.name}: nothing follows the last 'not run'"
    return found


def run_page(page: Path) -> int:
    """Runs a page's Python in the current folder; returns how many blocks that a reader sees have run."""
    names: dict[str, Any] = {"__name__": page.stem}
    count = 0
    for block in blocks_of(page):
        if block.language not in ("python", "setup"):
            continue
        place = f"{page.name}, line {block.line}"
        if block.skipped is not None:
            assert len(block.skipped) > 15, f"{place}: say why it is not run"
            continue
        try:
            exec(compile("\n" * block.line + block.to_run, str(page), "exec"), names)
        except Exception as error:
            raise AssertionError(f"{place}: {type(error).__name__}: {error}") from error
        count += block.language == "python"
    return count


def command_lines(page: Path) -> Iterator[tuple[int, list[str]]]:
    """The lines of shell blocks as words: (line, words). Comments and the prompt are left out."""
    for block in blocks_of(page):
        if block.language not in ("indented", "bash", "sh", "console", "shell"):
            continue
        joined = re.sub(r"\\\n\s*", "", block.code)
        for number, line in enumerate(joined.splitlines()):
            text = line.strip().removeprefix("$ ")
            if re.match(r"(lorank|make|python -m|python examples|torchrun|accelerate launch) ", text):
                words = shlex.split(text, comments=True)
                yield block.line + number, words[: words.index("|")] if "|" in words else words


def is_placeholder(word: str) -> bool:
    """Whether a word stands for something of the reader's: ``ADAPTER``, ``…``, ``my/adapter``."""
    return _PLACEHOLDER.search(word) is not None
