"""`lorank report` as a user types it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lorank.cli.app import app
from tests.experiments.run_folders import write_run

run = CliRunner(env={"COLUMNS": "400"})


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return write_run(tmp_path / "mine")


def test_a_page_and_figures_are_written(folder: Path, tmp_path: Path) -> None:
    result = run.invoke(app, ["report", str(folder), "--svg", "figures"])
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("written to report.html (1.")
    assert "<title>BalancedLoRA: mine" in (tmp_path / "report.html").read_text()
    names = {path.name for path in (tmp_path / "figures").iterdir()}
    assert {"ranks.svg", "ranks-change.svg", "heads-q_proj.svg", "loss.svg", "size.svg", "change.svg"} <= names


def test_json_prints_the_numbers_and_writes_nothing(folder: Path, tmp_path: Path) -> None:
    result = run.invoke(app, ["report", "mine", "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["runs"][0]["quality"] == {"test loss": 3.5}
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    result = run.invoke(app, ["report", "mine", "--json", "--out", "page.html"])
    assert json.loads(result.stdout)
    assert (tmp_path / "page.html").is_file()


def test_open_shows_the_page_in_a_browser(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    monkeypatch.setattr("typer.launch", opened.append)
    assert run.invoke(app, ["report", "mine", "--open"]).exit_code == 0
    assert opened == [Path("report.html").resolve().as_uri()]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], "nothing: there is no such folder"),
        (["mine", "--out", "mine"], "--out mine is a folder: name a file"),
        (["mine", "--png", "mine/config.yaml"], "--png mine/config.yaml is a file: name a folder"),
        (["mine", "--out", "mine/metrics.json"], "is no report of lorank and would be replaced"),
    ],
)
def test_mistakes_are_named_and_nothing_is_written(
    arguments: list[str], message: str, folder: Path, tmp_path: Path
) -> None:
    before = (folder / "metrics.json").read_text()
    result = run.invoke(app, ["report", *arguments])
    assert result.exit_code == 2
    assert message in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    assert (folder / "metrics.json").read_text() == before


def test_a_missing_package_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vl_convert", None)  # type: ignore[arg-type]  # None: there is no such module
    result = run.invoke(app, ["report", "mine"])
    assert result.exit_code == 2
    assert 'lorank report needs the package vl-convert-python: pip install "lorank[report]"' in result.stderr
