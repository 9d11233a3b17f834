"""Pages of the documentation link to what is there, and name files that are there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
ROOMS = [path.name for path in (ROOT / "src" / "lorank").iterdir() if path.is_dir()]
FOLDERS = "|".join(["src/lorank", "tests", "benchmarks", "examples", "docs", *sorted(ROOMS)])
LINK = re.compile(r"\]\(([^)\s]+)\)")
PATH = re.compile(rf"`((?:{FOLDERS})/[\w./]+)`")

pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


@pages
def test_links_lead_somewhere(page: Path) -> None:
    targets = [link.partition("#")[0] for link in LINK.findall(page.read_text(encoding="utf-8"))]
    missing = [t for t in targets if t and not t.startswith("http") and not (page.parent / t).exists()]
    assert not missing


@pages
def test_paths_in_code_style_exist(page: Path) -> None:
    named = PATH.findall(page.read_text(encoding="utf-8"))
    assert not [path for path in named if not any((base / path).exists() for base in (ROOT, ROOT / "src" / "lorank"))]


def test_every_decision_is_in_the_table() -> None:
    folder = ROOT / "docs" / "decisions"
    records = {path.name for path in folder.glob("[0-9]*.md")}
    assert records == set(LINK.findall((folder / "README.md").read_text(encoding="utf-8")))
