"""The documentation site is built without a warning and without the network, and fetches nothing when it is read."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FETCHED = re.compile(r"""<(?:script|img|iframe)\b[^>]*\bsrc=["']?(https?:|//)|<link\b[^>]*\bhref=["']?(https?:|//)""")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("material", reason="mkdocs-material is not installed (the extra docs)")
    pytest.importorskip("mkdocstrings", reason="mkdocstrings is not installed (the extra docs)")
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT,
        env={
            **os.environ,
            "NO_MKDOCS_2_WARNING": "1",
            "https_proxy": "http://127.0.0.1:9",
            "http_proxy": "http://127.0.0.1:9",
        },
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_every_page_is_built_and_found_by_the_search(site: Path) -> None:
    index = (site / "search" / "search_index.json").read_text(encoding="utf-8")
    for page in (ROOT / "docs").rglob("*.md"):
        inside = page.relative_to(ROOT / "docs").with_suffix("")
        built = site / inside.parent / ("" if inside.name in ("index", "README") else inside.name) / "index.html"
        assert built.is_file(), page
        place = built.parent.relative_to(site).as_posix().removeprefix(".")
        assert f'"location":"{place}{"/" if place else ""}"' in index, page


def test_no_page_fetches_anything_from_elsewhere(site: Path) -> None:
    for page in site.rglob("*.html"):
        assert not FETCHED.search(page.read_text(encoding="utf-8")), page
    for sheet in site.rglob("*.css"):
        assert not re.search(r"url\(\s*[\"']?(https?:|//)", sheet.read_text(encoding="utf-8")), sheet


def test_the_reference_documents_the_public_names(site: Path) -> None:
    import lorank

    text = (site / "api" / "index.html").read_text(encoding="utf-8")
    anchors = set(re.findall(r'id="lorank\.[\w.]*?(\w+)"', text))
    assert set(lorank.__all__) - {"__version__"} <= anchors
    assert not re.search(r":(class|func|mod|meth|attr):", text)  # Sphinx's form, which this site does not read


def test_links_to_files_of_the_repository_are_text_or_lead_there(site: Path) -> None:
    page = (site / "loops" / "index.html").read_text(encoding="utf-8")
    assert "raw_loop.py" in page
    assert 'href="../examples' not in page
    assert 'href="../../examples' not in page
