"""Progress is shown on a terminal only, or reported to a function."""

from __future__ import annotations

import pytest

from lorank.training.progress import scoring_progress


def test_nothing_is_shown_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    for shown in (None, False):
        with scoring_progress("scoring", shown) as report:
            assert report is None
    assert capsys.readouterr().err == ""


def test_a_function_is_called_instead_of_a_bar(capsys: pytest.CaptureFixture[str]) -> None:
    heard: list[tuple[int, int]] = []
    with scoring_progress("scoring", lambda done, total: heard.append((done, total))) as report:
        assert report is not None
        report(1, 3)
    assert heard == [(1, 3)]
    assert capsys.readouterr().err == ""


def test_a_bar_is_written_to_standard_error(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # for rich, the captured stream is a terminal then
    with scoring_progress("scoring ranks", True) as report:
        assert report is not None
        report(2, 3)
    written = capsys.readouterr()
    assert "scoring ranks" in written.err
    assert written.out == ""
