"""The table of families in docs/compatibility.md, which ``python -m tests.families`` writes."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from pathlib import Path

from tests.families.cell import METHODS
from tests.families.decoders import DECODERS
from tests.families.encoders import ENCODERS
from tests.families.family import Family
from tests.families.own import OWN
from tests.families.senses import SENSES
from tests.families.seq2seq import SEQ2SEQ

PAGE = Path(__file__).parents[2] / "docs" / "compatibility.md"
BEGIN, END = "<!-- families: python -m tests.families writes these lines -->", "<!-- end of families -->"
FAMILIES: dict[str, Family] = {**DECODERS, **SEQ2SEQ, **ENCODERS, **SENSES, **OWN}


def row(name: str, says: Mapping[str, str]) -> str:
    """One family's line.

    Args:
        says: per method, what its cell says.
    """
    return f"| {name} | {FAMILIES[name].task} | {' | '.join(says[method] for method in METHODS)} |"


def written(says: Mapping[str, Mapping[str, str]], sentence: str) -> str:
    """The page with a new table.

    Args:
        says: per family and method, what the cell says.
        sentence: what the run that made the table has measured.
    """
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    _, mark, after = rest.partition(END)
    assert mark, f"{PAGE} has no line {BEGIN}, or none {END}"
    head = [f"| family | learns | {' | '.join(METHODS)} |", "|---" * (len(METHODS) + 2) + "|"]
    lines = [textwrap.fill(sentence, 118), "", *head, *(row(name, says[name]) for name in FAMILIES)]
    return "\n".join([f"{before}{BEGIN}", "", *lines, "", f"{END}{after}"])


def on_the_page() -> dict[str, dict[str, str]]:
    """Per family and method, what the page says."""
    text = PAGE.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0]
    rows = [
        [cell.strip() for cell in line.strip("|").split(" | ")] for line in text.splitlines() if line.startswith("|")
    ]
    return {name: dict(zip(METHODS, cells, strict=True)) for name, _, *cells in rows[2:]}
