from __future__ import annotations

import csv
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console
from typer.testing import CliRunner

from lorank.cli.app import app
from lorank.config.settings import ConfigError
from lorank.experiments import RunFolderError, train
from lorank.experiments.sweep import load_sweep, run_sweep
from lorank.experiments.sweep_table import summary, write_results

Write = Callable[..., Path]


@pytest.fixture
def write(values: dict[str, Any], tmp_path: Path) -> Write:
    """A sweep of static runs of two steps, with changes."""

    def build(**changes: Any) -> Path:
        base = {key: value for key, value in values.items() if key != "output_dir"}
        base["allocator"] = {"name": "static"}
        base["training"] = {**base["training"], "max_steps": 2, "eval_steps": 2}
        sweep = {
            "base": base,
            "grid": {"lora.r": [1, 2], "training.lr": [1e-05]},
            "seeds": [0, 1],
            "output_dir": str(tmp_path / "sweep"),
        }
        path = tmp_path / "sweep.yaml"
        path.write_text(yaml.safe_dump({**sweep, **changes}, sort_keys=False))
        return path

    return build


def test_runs_are_variants_times_grid_times_seeds(write: Write) -> None:
    alora = {"allocator": {"name": "alora", "unit": "steps", "k1": 1}}
    out, runs = load_sweep(write(variants={"plain": {}, "moving": alora}))
    assert len(runs) == 2 * 2 * 2
    assert {run.config.lora.r for run in runs} == {1, 2}
    assert all(run.config.training.lr == 1e-5 for run in runs)
    assert [run.config.allocator.name for run in runs] == ["static"] * 4 + ["alora"] * 4
    assert runs[0].label == "plain, r=1, lr=1e-05"
    assert runs[0].settings == {"variant": "plain", "lora.r": 1, "training.lr": 1e-5}
    folders = {Path(run.config.output_dir) for run in runs}
    assert len(folders) == 8
    assert all(folder.parent.parent == out and folder.name in ("seed0", "seed1") for folder in folders)


def test_the_base_may_be_a_recipe_beside_the_sweep(write: Write, recipe: Path) -> None:
    _, runs = load_sweep(write(base="recipe.yaml", grid={}), ["training.lr=0.5", "output_dir=elsewhere"])
    assert [run.config.training.seed for run in runs] == [0, 1]
    assert runs[0].config.training.lr == 0.5
    assert runs[0].config.output_dir == str(Path("elsewhere") / "base" / "seed0")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"grid": {"lora.rank": [1]}}, r"lora\.rank: unknown key; did you mean lora\.r\?"),
        ({"grid": {"lora.r": [1, 0]}}, r"lora\.r: .*given 0"),
        ({"variants": {"wrong": {"allocator.rounds": 3}}}, r"allocator\.rounds: unknown key"),
        ({"grids": {}}, r"grids: unknown key; did you mean grid\?"),
        ({"base": "nowhere.yaml"}, "base: .*nowhere.yaml: there is no such file"),
        ({"grid": {"lora.r": []}}, r"grid\.lora\.r has no values"),
        ({"grid": {"lora.r": [1, 1]}}, "two runs would share"),
        ({"seeds": [3, 3]}, "two runs would share"),
        ({"grid": {"training.seed": [1, 2]}}, "use the sweep's own key seeds"),
        ({"variants": {"small": {"lora.r": 1}}}, r"lora\.r is in the grid and in the variant 'small'"),
    ],
)
def test_mistakes_show_before_anything_runs(write: Write, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_sweep(write(**changes))


def test_each_run_resolves_its_own_references(write: Write) -> None:
    sweep = write(grid={"lora.r": [1, 2]}, variants={"a": {"lora.alpha": "${lora.r}"}, "b": {}}, seeds=[3])
    _, runs = load_sweep(sweep, ["training.eval_steps=${training.seed}"])
    assert [run.config.lora.alpha for run in runs] == [1, 2, 8, 8]
    assert {run.config.training.eval_steps for run in runs} == {3}


def test_the_folder_of_a_sweep_cannot_refer_to_keys_of_its_runs(write: Write) -> None:
    with pytest.raises(ConfigError, match=r"output_dir: \$\{lora\.r\}: there is no such key"):
        load_sweep(write(output_dir="runs/${lora.r}"))


def test_a_malformed_override_is_told_once_for_all_runs(write: Write) -> None:
    with pytest.raises(ConfigError) as caught:
        load_sweep(write(), ["training.lr", "lora.r.x=1"])
    assert str(caught.value).count("expected key=value") == 1
    assert str(caught.value).count("lora.r is 4 and has no keys below it") == 1


def test_a_sweep_runs_once_and_reports(write: Write) -> None:
    out, runs = load_sweep(write(seeds=[0]))
    first = run_sweep(runs)
    assert (first.new, len(first.finished), first.failures) == (2, 2, [])
    again = run_sweep(runs)
    assert (again.new, len(again.finished)) == (0, 2)
    assert [f.metrics for f in again.finished] == [f.metrics for f in first.finished]

    files = write_results(again, out)
    assert [file.name for file in files] == ["table.md", "table.csv", "pareto.png"]
    rows = list(csv.DictReader((out / "table.csv").read_text().splitlines()))
    assert [row["lora.r"] for row in rows] == ["1", "2"]
    for row, run in zip(rows, first.finished, strict=True):
        assert float(row["validation loss"]) == run.metrics["validation"]["loss_after"]
        assert int(row["parameters"]) == run.metrics["final"]["trainable_parameters"]
    assert int(rows[1]["total rank"]) == 2 * int(rows[0]["total rank"])
    head, lines = summary(again.finished)
    assert head[:3] == ["lora.r", "training.lr", "seeds"]
    assert [line[0] for line in lines] == ["1", "2"]
    assert "| 1 | 1e-05 | 0 |" in (out / "table.md").read_text()


def test_a_failure_is_told_and_tried_again(write: Write) -> None:
    out, runs = load_sweep(write(seeds=[0]))

    def failing(config: Any, **options: Any) -> Any:
        if config.lora.r == 1:
            raise RuntimeError("no memory left [/cpu] [red]")  # not the markup of a console
        return train(config, **options)

    console = Console(file=io.StringIO(), width=200)
    result = run_sweep(runs, train_run=failing, console=console)
    assert "failed RuntimeError: no memory left [/cpu] [red]" in console.file.getvalue()
    assert [f.run.config.lora.r for f in result.finished] == [2]
    assert result.failures == [("r=1, lr=1e-05", 0, "RuntimeError: no memory left [/cpu] [red]")]
    write_results(result, out)
    assert "failed: r=1, lr=1e-05, seed 0: RuntimeError: no memory left [/cpu] [red]" in (out / "table.md").read_text()
    assert run_sweep(runs).new == 1


def test_another_configuration_in_a_runs_folder_is_refused_before_anything_runs(write: Write) -> None:
    _, runs = load_sweep(write(seeds=[0]))
    train(runs[1].config)
    _, others = load_sweep(write(seeds=[0]), ["training.batch_size=2"])
    with pytest.raises(RunFolderError, match=r"training\.batch_size: 4 → 2"):
        run_sweep(others)
    assert not Path(others[0].config.output_dir).exists()


def test_the_command(write: Write, tmp_path: Path) -> None:
    file = str(write(grid={"lora.r": [1]}, seeds=[0]))
    run = CliRunner(env={"COLUMNS": "200"})
    done = run.invoke(app, ["sweep", file])
    assert done.exit_code == 0, done.output
    assert "runs: 1 new, 0 finished before" in done.output
    assert "runs: 0 new, 1 finished before" in run.invoke(app, ["sweep", file]).output
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "table.md").write_text("mine")
    refused = run.invoke(app, ["sweep", file, f"output_dir={foreign}"])
    assert refused.exit_code == 2
    assert "table.md would be replaced" in " ".join(refused.stderr.split())
    assert [path.name for path in foreign.iterdir()] == ["table.md"]
    wrong = run.invoke(app, ["sweep", file, "training.lr=fast"])
    assert wrong.exit_code == 2
    assert "training.lr" in wrong.stderr
    # a target that no module has: every run fails, and the command says so by its status
    failed = run.invoke(app, ["sweep", file, "lora.target_modules=[qkv]", f"output_dir={tmp_path / 'other'}"])
    assert failed.exit_code == 1
    assert "r=1, seed 0: SettingsError" in failed.stderr


@pytest.mark.parametrize(("name", "count"), [("ard_ablation", 4), ("ard_lambda_beta", 12)])
def test_the_sweeps_that_come_with_lorank_are_right(name: str, count: int) -> None:
    _, runs = load_sweep(name)
    assert len(runs) == count
    assert {run.config.allocator.name for run in runs} == {"ard"}
