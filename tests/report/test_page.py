"""The page as text: complete, escaped, and closed to everything outside it."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from html.parser import HTMLParser

import pytest

from lorank.report.page import report_page
from tests.report.runs import HOSTILE, NAMES, made_run


class Elements(HTMLParser):
    """The elements of a page, and the text of its scripts."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self._in_script = False
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attributes)))
        if tag == "script":
            self._in_script = True
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self._in_script = self._in_script and tag != "script"

    def handle_data(self, text: str) -> None:
        if self._in_script:
            self.scripts[-1] += text

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.found if name == tag]


def test_names_and_texts_of_a_stranger_are_text_and_never_markup(page_text: str) -> None:
    assert HOSTILE not in page_text
    found = Elements(page_text)
    assert not found.of("b")
    assert len(found.scripts) == 3  # the numbers, Vega, and the page's own code


def test_the_browser_may_run_the_two_scripts_of_the_page_and_load_nothing(page_text: str) -> None:
    found = Elements(page_text)
    policy = next(m["content"] for m in found.of("meta") if m.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert policy.startswith("default-src 'none';")
    hashes = [base64.b64encode(hashlib.sha256(code.encode()).digest()).decode() for code in found.scripts[1:]]
    assert re.findall(r"sha256-([^']+)", policy) == hashes
    assert "unsafe-eval" not in policy
    assert not [a for _, a in found.found if a.get("src") or (a.get("href") or "#")[0] != "#"]
    assert not found.of("link")


def test_the_page_is_small_enough_to_send(page_text: str) -> None:
    assert 500_000 < len(page_text.encode()) < 2_000_000


def test_the_numbers_in_the_page_are_those_of_the_run(page_text: str) -> None:
    numbers = json.loads(Elements(page_text).scripts[0])
    run = made_run()
    shown = numbers["runs"][0]
    assert shown["steps"] == [0, 10, 20, 30]
    modules = [cell[2] for cell in shown["cells"]]
    assert sorted(modules) == sorted(NAMES)
    for frame, ranks in zip(run.frames, shown["ranks"], strict=True):
        assert dict(zip(modules, ranks, strict=True)) == dict(frame.ranks)
    assert set(shown["heads"]) == {"q_proj", "v_proj"}
    assert set(shown["specs"]) == {"loss", "size", "change", "worth", "curve"}


def test_every_figure_has_a_sentence_and_a_table(page_text: str) -> None:
    found = Elements(page_text)
    charts = [a for a in found.of("div") if a.get("class") == "chart"]
    assert len(charts) >= 10
    assert all(chart["role"] == "img" and len(chart["aria-label"] or "") > 20 for chart in charts)
    figures = len(found.of("figure"))
    tables = sum("numbers" in (a.get("class") or "") for a in found.of("details"))
    assert tables >= figures
    assert found.of("html")[0]["lang"] == "en"


def test_a_long_run_is_thinned_to_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorank.report.page.MOST_NUMBERS", 1200)  # 100 frames of 12 modules
    run = made_run()
    frames = [type(run.last)(step, run.last.ranks, 4800, pruned=1) for step in range(1000)]
    numbers = json.loads(Elements(report_page([made_run(frames=frames)])).scripts[0])
    steps = numbers["runs"][0]["steps"]
    assert (len(steps), steps[0], steps[-1]) == (100, 0, 999)
