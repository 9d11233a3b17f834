"""`lorank curve` on a finished run and on a recipe."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from matplotlib.image import imread
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification
from typer.testing import CliRunner, Result

import lorank as package
from lorank.cli.app import app
from lorank.config.settings import load_config
from lorank.experiments.adapter_session import load_finished
from lorank.experiments.curve import wide_config
from lorank.experiments.errors import SettingsError
from lorank.lora import find_layers


def lorank(*arguments: str | Path | float) -> Result:
    return CliRunner(env={"COLUMNS": "400"}).invoke(app, [str(part) for part in arguments])


@pytest.fixture
def run(recipe: Path, values: dict[str, Any]) -> Path:
    assert lorank("train", recipe, "training.max_steps=4", "allocator={name: static}").exit_code == 0
    return Path(values["output_dir"])


def test_a_finished_run(run: Path, values: dict[str, Any], tmp_path: Path) -> None:
    """The table, the files and the LoraConfig say what the function says."""
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    out = tmp_path / "curve"
    result = lorank("curve", run, "--samples", 12, "--out", out)
    assert result.exit_code == 0, result.output
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before
    loaded = load_finished(run)
    examples, collate = loaded.task.validation, loaded.task.collator
    curve = package.rank_curve(loaded.model, [collate(examples[:8]), collate(examples[8:12])])
    written = json.loads((out / "curve.json").read_text())
    assert written["samples"] == 12
    assert [point["ranks"] for point in written["points"]] == [dict(point.ranks) for point in curve.points]
    assert written["loss"] == pytest.approx(curve.loss)
    assert written["worth"].keys() == loaded.layers.keys()
    assert imread(out / "curve.png")[..., :3].min() < 0.5
    for point in curve.points:
        (line,) = [
            line
            for line in result.stdout.splitlines()
            if f"│ {point.parameters:,} │".replace(" ", "") in line.replace(" ", "")
        ]
        assert f"{point.loss:.4f}" in line
        assert ("knee" in line) is (point is curve.knee)
    assert json.loads(lorank("curve", run, "--samples", 12, "--json").stdout)["points"] == written["points"]
    for at in ("knee", "50%"):
        printed = json.loads(lorank("curve", run, "--samples", 12, "--at", at).stdout)
        assert printed == json.loads(json.dumps(curve.lora_config(at)))
    base = AutoModelForSequenceClassification.from_pretrained(values["model"]["name"], num_labels=2)
    fresh = find_layers(get_peft_model(base, LoraConfig(task_type="SEQ_CLS", **printed)))
    assert fresh.ranks == {name: rank for name, rank in curve.at("50%").ranks.items() if rank}
    again = lorank("curve", run, "--out", out)
    assert (again.exit_code, "has a rank curve" in again.stderr) == (2, True)


def test_a_recipe_is_trained_wide_for_a_part_of_its_steps(recipe: Path, values: dict[str, Any]) -> None:
    result = lorank("curve", recipe, "--rank", 6, "--fraction", 0.5, "training.lr=1e-3")
    assert result.exit_code == 0, result.output
    out = Path(values["output_dir"] + "_curve")
    assert f"written to {out}" in result.stdout
    assert "trained for 6 steps" in result.stdout  # of 12
    written = json.loads((out / "curve.json").read_text())
    assert written["steps"] == 6
    assert set(written["points"][-1]["ranks"].values()) == {6}
    config = load_config(out / "run" / "config.yaml")
    assert (config.lora.r, config.lora.alpha) == (6, 12)  # alpha / r is the recipe's
    assert (config.allocator.name, config.training.lr) == ("static", 1e-3)
    assert not Path(values["output_dir"]).exists()
    refused = lorank("curve", recipe, "--rank", 6, "--fraction", 0.5)
    assert "has a rank curve" in refused.stderr
    assert lorank("curve", recipe, "--rank", 6, "--fraction", 0.25, "--overwrite").exit_code == 0
    assert json.loads((out / "curve.json").read_text())["steps"] == 3


def test_the_factor_of_rslora_stays(recipe: Path, tmp_path: Path) -> None:
    overrides = ["lora.use_rslora=true"]
    config = wide_config(load_config(recipe, overrides), recipe, overrides, tmp_path, rank=16, fraction=1)
    assert config.lora.alpha / 16**0.5 == pytest.approx(8 / 4**0.5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["run", "--rank", 8], "--rank and --fraction are for the run of a recipe"),
        (["run", "--at", "bend"], "'knee', '50%' or such a budget"),
        (["no_recipe"], "there is no such file"),
        (["recipe.yaml", "--data", "e2e_nlg"], "--data is for adapters"),
        (["recipe.yaml", "--fraction", 2], "--fraction 2: expected above 0 and at most 1"),
        (["recipe.yaml", "lora.rank=3"], "lora.rank"),
        ([".", "--samples", 4], "has no adapter_config.json"),
    ],
)
def test_mistakes(
    recipe: Path,
    tmp_path: Path,
    options: list[Any],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    if "run" in options:
        request.getfixturevalue("run")
    monkeypatch.chdir(tmp_path)
    result = lorank("curve", *options)
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert not list(tmp_path.rglob("curve.json"))


def test_only_files_of_a_curve_are_replaced(run: Path, tmp_path: Path) -> None:
    for name in ("curve.json", "curve.png"):
        (tmp_path / name).mkdir()
        theirs = tmp_path / name / name
        theirs.write_text("{}")
        result = lorank("curve", run, "--out", tmp_path / name, "--overwrite")
        assert "that is not of a rank curve" in result.stderr
        assert theirs.read_text() == "{}"


def test_full_fine_tuning_has_no_ranks(recipe: Path, tmp_path: Path) -> None:
    overrides = ["allocator={name: full}"]
    with pytest.raises(SettingsError, match="have no ranks"):
        wide_config(load_config(recipe, overrides), recipe, overrides, tmp_path, rank=4, fraction=1)
