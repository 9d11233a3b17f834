"""A sweep in one process: samplers, objectives, results, failures, the command."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
from rich.console import Console
from typer.testing import CliRunner

from lorank.cli.app import app
from lorank.experiments import RunFolderError, train
from lorank.experiments.sweep import SweepResult, load_sweep, run_sweep
from lorank.experiments.sweep.jobs import place_of
from lorank.experiments.sweep.queue import StudyError
from lorank.experiments.sweep.results import PARAMETERS
from lorank.experiments.sweep.tables import summary, write_results
from tests.experiments.sweep.fakes import fast, metrics_of

Write = Callable[..., Path]
StudyOf = Callable[..., optuna.Study]
LR = {"low": 1e-4, "high": 1e-1, "log": True}


def quietly(*arguments: Any, **options: Any) -> SweepResult:
    return run_sweep(*arguments, console=Console(file=io.StringIO()), **options)


def test_a_real_sweep_runs_once_and_reports(write: Write, study_of: StudyOf) -> None:
    sweep = load_sweep(write(seeds=[0]))
    first = quietly(sweep)
    assert (first.new, len(first.finished), first.failures, first.unfinished) == (2, 2, [], 0)
    again = quietly(sweep)
    assert (again.new, again.finished) == (0, first.finished)

    files = write_results(again, sweep.out)
    assert [file.name for file in files] == ["table.md", "table.csv", "results.jsonl", "pareto.png"]
    rows = list(csv.DictReader((sweep.out / "table.csv").read_text().splitlines()))
    assert [row["lora.r"] for row in rows] == ["1", "2"]
    for row, setting in zip(rows, sweep.grid(), strict=True):
        metrics = json.loads((Path(setting.runs[0].output_dir) / "metrics.json").read_text())
        assert float(row["validation loss"]) == metrics["validation"]["loss_after"]
        assert int(row["parameters"]) == metrics["final"]["trainable_parameters"]
    assert int(rows[1]["total rank"]) == 2 * int(rows[0]["total rank"])
    lines = [json.loads(line) for line in (sweep.out / "results.jsonl").read_text().splitlines()]
    assert [str(line["validation loss"]) for line in lines] == [row["validation loss"] for row in rows]
    head, table = summary(again.finished)
    assert head[:3] == ["lora.r", "training.lr", "seeds"]
    assert [line[0] for line in table] == ["1", "2"]
    assert "| 1 | 1e-05 | 0 |" in (sweep.out / "table.md").read_text()

    # what optuna-dashboard shows
    trial = study_of(place_of(sweep)).trials[0]
    assert trial.params == {"lora.r": 1, "training.lr": 1e-05}
    assert trial.user_attrs["folder"] == str(Path(sweep.grid()[0].runs[0].output_dir).parent)
    assert trial.user_attrs["parameters"] == int(rows[0]["parameters"])
    assert sum(trial.user_attrs["ranks"].values()) == int(rows[0]["total rank"])


def test_a_trial_is_the_mean_over_its_seeds(write: Write, study_of: StudyOf) -> None:
    sweep = load_sweep(write(seeds=[0, 10, 20]))
    result = quietly(sweep, train_run=fast)
    losses = [metrics_of(run)["validation"]["loss_after"] for run in sweep.grid()[0].runs]
    study = study_of(place_of(sweep))
    assert study.trials[0].value == pytest.approx(sum(losses) / 3)
    assert study.metric_names == ["validation_loss"]
    assert result.best is not None
    assert result.best.settings["lora.r"] == 2
    assert "± 0.01" in (write_results(result, sweep.out)[0]).read_text()


@pytest.mark.parametrize("sampler", ["random", "tpe"])
def test_a_sampler_makes_as_many_trials_as_asked_and_more_later(write: Write, sampler: str) -> None:
    space = {"lora.r": {"low": 1, "high": 16, "log": True}, "training.lr": LR}
    path = write(space=space, sampler=sampler, trials=5, seeds=[0])
    result = quietly(load_sweep(path), train_run=fast)
    assert (result.new, len(result.finished)) == (5, 5)
    settings = [trial.settings for trial in result.finished]
    assert len({setting["training.lr"] for setting in settings}) == 5
    assert all(1e-4 <= setting["training.lr"] <= 1e-1 and 1 <= setting["lora.r"] <= 16 for setting in settings)
    losses = [trial.mean("validation loss") for trial in result.finished]
    assert losses == sorted(losses)
    more = quietly(load_sweep(path, ["trials=7"]), train_run=fast)
    assert (more.new, len(more.finished)) == (2, 7)
    fewer = quietly(load_sweep(path, ["trials=3"]), train_run=fast)
    assert (fewer.new, len(fewer.finished)) == (0, 3)
    # the same seed makes the same trials, whatever the study; the first ten of tpe are random
    other = quietly(load_sweep(path, [f"output_dir={path.parent / 'other'}", "trials=2"]), train_run=fast)
    key = {trial.slot: trial.settings for trial in result.finished}
    assert {trial.slot: trial.settings for trial in other.finished} == {slot: key[slot] for slot in range(2)}


def test_tpe_searches_where_it_is_good(write: Write) -> None:
    space = {"training.lr": {"low": 1e-7, "high": 1, "log": True}}
    sweep = load_sweep(write(space=space, sampler="tpe", trials=14, seeds=[0]))
    last = [trial for trial in quietly(sweep, train_run=fast).finished if trial.slot >= 10]  # the first ten are random
    # random rates would have a mean loss of 1 + (49 / 12 + 1.5²) / 4 = 2.58
    assert sum(trial.mean("validation loss") for trial in last) / len(last) < 1.7


def test_two_objectives_give_the_pareto_front(write: Write, study_of: StudyOf) -> None:
    space = {"lora.r": [1, 2, 4, 8], "training.lr": [0.01, 0.1]}
    sweep = load_sweep(write(space=space, seeds=[0], objectives=["validation_loss", "parameters"]))
    result = quietly(sweep, train_run=fast)
    front = [(trial.settings["lora.r"], trial.settings["training.lr"]) for trial in result.front]
    assert front == [(1, 0.01), (2, 0.01), (4, 0.01)]
    study = study_of(place_of(sweep))
    assert {(trial.params["lora.r"], trial.params["training.lr"]) for trial in study.best_trials} == set(front)
    assert study.metric_names == ["validation_loss", "parameters"]
    text = write_results(result, sweep.out)[0].read_text()
    assert "Pareto front of parameters and validation loss: r=1, lr=0.01 (100, 1.5000); r=2" in text


def test_a_diverged_run_is_the_worst_and_not_lost(write: Write, study_of: StudyOf) -> None:
    def diverging(config: Any, **options: Any) -> Any:
        result = fast(config, **options)
        if config.lora.r == 1:
            result.metrics["validation"]["loss_after"] = math.nan
        return result

    sweep = load_sweep(write(seeds=[0]))
    result = quietly(sweep, train_run=diverging)
    assert [math.isnan(trial.mean("validation loss")) for trial in result.finished] == [True, False]
    assert [trial.value for trial in study_of(place_of(sweep)).trials] == [math.inf, pytest.approx(3.5)]
    assert result.best is not None
    assert result.best.mean(PARAMETERS) == 200
    write_results(result, sweep.out)
    assert json.loads((sweep.out / "results.jsonl").read_text().splitlines()[0])["validation loss"] is None


def test_median_stops_a_hopeless_trial_in_its_second_half(write: Write) -> None:
    steps = []

    def watched(config: Any, **options: Any) -> Any:
        for step in range(1, 11):
            options["watch"].evaluation(step, 10, abs(math.log10(config.training.lr / 0.01)))
            steps.append((config.training.lr, step))
        return fast(config, **options)

    lrs = [0.01, 0.011, 0.012, 0.013, 0.014, 10.0, 0.0101]
    sweep = load_sweep(write(space={"training.lr": lrs}, seeds=[0], pruner="median"))
    result = quietly(sweep, train_run=watched)
    assert result.pruned == ["lr=10"]
    assert (len(result.finished), result.failures, result.unfinished) == (6, [], 0)
    assert max(step for lr, step in steps if lr == 10.0) == 4
    assert "stopped early: lr=10" in write_results(result, sweep.out)[0].read_text()
    assert quietly(sweep, train_run=watched).new == 0


def test_a_failure_is_told_and_tried_again(write: Write) -> None:
    sweep = load_sweep(write(seeds=[0]))

    def failing(config: Any, **options: Any) -> Any:
        if config.lora.r == 1:
            raise RuntimeError("no memory left [/cpu] [red]")  # not the markup of a console
        return fast(config, **options)

    console = Console(file=io.StringIO(), width=200)
    result = run_sweep(sweep, train_run=failing, console=console)
    assert "1 of 2: r=1, lr=1e-05: failed RuntimeError: no memory left [/cpu] [red]" in console.file.getvalue()
    assert [trial.settings["lora.r"] for trial in result.finished] == [2]
    assert result.failures == [("r=1, lr=1e-05", "RuntimeError: no memory left [/cpu] [red]")]
    write_results(result, sweep.out)
    assert "failed: r=1, lr=1e-05: RuntimeError: no memory left [/cpu] [red]" in (sweep.out / "table.md").read_text()
    again = quietly(sweep, train_run=fast)
    assert (again.new, len(again.finished), again.failures) == (1, 2, [])


def test_it_tells_after_the_first_trial_how_long_the_others_take(write: Write) -> None:
    sweep = load_sweep(write(space={"lora.r": [1, 2, 3]}, seeds=[0]))
    console = Console(file=io.StringIO(), width=200)
    run_sweep(sweep, train_run=fast, console=console)
    lines = re.sub(r"\b0(\.\d+)? s", "no time", console.file.getvalue()).splitlines()
    assert [line.partition(":")[0] for line in lines] == [
        "1 of 3",
        "2 trials to go, about no time left",
        "2 of 3",
        "3 of 3",
    ]
    assert lines[0] == "1 of 3: r=1: validation loss 1.5684, 100 parameters, no time"


def test_an_interrupted_trial_goes_back_to_the_queue(write: Write, study_of: StudyOf) -> None:
    sweep = load_sweep(write(seeds=[0]))

    def interrupted(config: Any, **options: Any) -> Any:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quietly(sweep, train_run=interrupted)
    assert [trial.state.name for trial in study_of(place_of(sweep)).trials] == ["FAIL", "WAITING", "WAITING"]
    result = quietly(sweep, train_run=fast)
    assert (result.new, result.failures, result.unfinished) == (2, [], 0)


def test_finished_runs_are_taken_over_by_another_study(write: Write) -> None:
    path = write()
    quietly(load_sweep(path), train_run=fast)
    wider = load_sweep(path, ["space.lora.r=[1, 2, 3]"])
    with pytest.raises(StudyError, match=r"begun with other settings:\n  space.lora.r: \[1, 2\] → \[1, 2, 3\]"):
        quietly(wider, train_run=fast)
    calls = []

    def counting(config: Any, **options: Any) -> Any:
        calls.append((config.lora.r, config.training.seed))
        return fast(config, **options)

    result = quietly(wider, place_of(wider, study="wider"), train_run=counting)
    assert (result.new, len(result.finished)) == (1, 3)
    assert calls == [(3, 0), (3, 1)]


def test_another_configuration_in_a_runs_folder_is_refused_before_anything_runs(write: Write) -> None:
    sweep = load_sweep(write(seeds=[0]))
    fast(sweep.grid()[1].runs[0], resume=False)
    other = load_sweep(write(seeds=[0]), ["training.batch_size=2"])
    with pytest.raises(RunFolderError, match=r"training\.batch_size: 4 → 2"):
        quietly(other, train_run=train)
    assert [path.name for path in other.out.iterdir()] == ["r=2_lr=1e-05"]


def test_the_command(write: Write, tmp_path: Path) -> None:
    file = str(write(space={"lora.r": [1]}, seeds=[0]))
    run = CliRunner(env={"COLUMNS": "200"})
    dry = run.invoke(app, ["sweep", file, "--dry-run"])
    assert dry.exit_code == 0, dry.output
    assert "1: r=1" in dry.output
    assert "Nothing was run or written." in dry.output
    assert not (tmp_path / "sweep").exists()
    done = run.invoke(app, ["sweep", file])
    assert done.exit_code == 0, done.output
    assert "1 trial, sampler grid; study sweep in sqlite:///" in done.stderr
    assert "trials: 1 new, 0 finished before" in done.stdout
    assert "Lowest validation loss: " in done.stdout
    again = run.invoke(app, ["sweep", file, "--json"])
    values = json.loads(again.stdout)
    assert values["trials"] == {
        "asked": 1, "finished": 1, "new": 0, "stopped_early": 0, "failed": 0, "unfinished": 0
    }  # fmt: skip
    assert values["best"]["settings"] == {"lora.r": 1}
    assert Path(values["best"]["folders"][0], "adapter").is_dir()
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
    # a target that no module has: every trial fails, and the command says so by its status
    failed = run.invoke(app, ["sweep", file, "lora.target_modules=[qkv]", f"output_dir={tmp_path / 'other'}"])
    assert failed.exit_code == 1
    assert "failed: r=1: SettingsError" in failed.stderr
