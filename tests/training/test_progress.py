"""The progress bar for scoring: where it is shown, and what it counts."""

from __future__ import annotations

import sys

import pytest

from lorank.training.progress import scoring_progress


def test_a_bar_counts_the_evaluations_and_disappears(capsys: pytest.CaptureFixture[str]) -> None:
    with scoring_progress("scoring ranks", True) as report:
        assert report is not None
        report(3, 4)
        report(4, 4)
    written = capsys.readouterr().err
    assert "scoring ranks" in written
    assert written.endswith("\r")


def test_a_function_replaces_the_bar(capsys: pytest.CaptureFixture[str]) -> None:
    calls: list[tuple[int, int]] = []
    with scoring_progress("scoring ranks", lambda done, total: calls.append((done, total))) as report:
        assert report is not None
        report(1, 2)
    assert calls == [(1, 2)]
    assert not capsys.readouterr().err


@pytest.mark.parametrize(("shown", "terminal", "bar"), [(None, False, False), (None, True, True), (False, True, False)])
def test_by_default_the_bar_is_on_terminals_only(
    shown: bool | None, terminal: bool, bar: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    with scoring_progress("scoring ranks", shown) as report:
        assert (report is not None) == bar
