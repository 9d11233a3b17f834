"""Lines of tables in Markdown."""

from __future__ import annotations

from collections.abc import Sequence


def head(names: Sequence[str]) -> list[str]:
    """The two first lines of a table: the first column left, the others right."""
    return [line(names), line(["---", *["---:"] * (len(names) - 1)])]


def line(cells: Sequence[str]) -> str:
    """One line of a table."""
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
