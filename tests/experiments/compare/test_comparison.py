from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from typer.testing import CliRunner

from lorank.cli.app import app
from lorank.errors import BudgetError, NonFiniteError
from lorank.experiments.compare import recipe_runs
from lorank.experiments.compare.comparison import assess, make_subject, run_comparison, tidy_rows, wanted_runs
from lorank.experiments.compare.example_losses import example_losses
from lorank.experiments.compare.file import Comparison, read_comparison
from lorank.experiments.compare.recipe_runs import task_of
from lorank.experiments.compare.tables import markdown, rich_tables, write_results
from lorank.experiments.models import load_model
from lorank.experiments.study.trials import Results
from lorank.tasks import mean_loss

METHODS = {
    "LoRA": {"allocator": {"name": "static"}},
    "AdaLoRA": {"allocator": {"name": "adalora"}},
    "Balanced": {"allocator": {"name": "balanced"}, "title": "BalancedLoRA"},
}


@pytest.fixture
def file(values: dict[str, Any], tmp_path: Path) -> Path:
    base = {key: value for key, value in values.items() if key not in ("output_dir", "allocator")}
    base["training"] = {**base["training"], "max_steps": 4}
    content = {
        "base": base,
        "methods": METHODS,
        "budgets": [1, 2],
        "lrs": [1e-3, 2e-3],
        "growth": 0,
        "seeds": [0, 1],
        "references": [1, 2],
        "metric": "accuracy",
        "output_dir": str(tmp_path / "out"),
    }
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def trials_of(comparison: Comparison) -> tuple[Any, dict[str, Any]]:
    subject = make_subject(comparison)
    wanted = wanted_runs(comparison, subject, {})
    return subject, {trial.fingerprint: trial for trial in wanted.trials}


def test_all_methods_end_within_the_same_size(file: Path) -> None:
    subject, trials = trials_of(read_comparison(file))
    # two layers, q and v: (64 + 64) + (64 + 32) numbers a rank
    one = {
        entry.parameters for entry in subject.entries if entry.budget == "1 per module" and entry.reference in (None, 1)
    }
    assert len(one) == 1
    (small,) = one
    assert {e.parameters for e in subject.entries if e.budget == "2 per module" and not e.reference} == {2 * small}
    for trial in trials.values():
        config = trial.run_config("-")
        assert config.lora.alpha / config.lora.r == 2, "s is the base's"
        assert config.allocator.budget.parameters in (small, 2 * small, 4 * small)
        wide = 2 if config.allocator.name == "adalora" else 1
        assert config.lora.r == wide * config.allocator.budget.parameters // small
        assert not config.training.load_best_model_at_end
    # LoRA at budget 2 is also LoRA with twice the parameters at budget 1: run once
    sizes = [
        config.allocator.budget.parameters
        for t in trials.values()
        if (config := t.run_config("-")).allocator.name == "static"
    ]
    assert sorted(sizes) == sorted([small, 2 * small, 4 * small] * 2)
    assert len(subject.contenders) == 7


def test_a_comparison_from_end_to_end(file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = ["compare", str(file), "--methods", "Balanced", "budgets=[1]"]
    run = CliRunner(env={"COLUMNS": "200"})
    done = run.invoke(app, command)
    assert done.exit_code == 0, done.output
    assert "12 runs; the first ones will tell how long that takes" in done.stderr
    assert "A quick look" not in done.output
    shown = " ".join(done.stdout.split())
    result = json.loads((out / "comparison.json").read_text())
    assert (result["baseline"], result["budgets"], result["metric"]) == ("LoRA", ["1 per module"], "accuracy")
    assert [row["title"] for row in result["rows"]][:2] == ["LoRA", "BalancedLoRA"]
    assert [row["reference"] for row in result["rows"]] == [None, None, 2]
    lines = Results(out / "results.jsonl").read()
    size = result["rows"][0]["parameters"]
    for row in result["rows"][:2]:
        assert set(row["lr_grid"]) == {"0.001", "0.002"}
        assert row["lr_grid"][f"{row['lr']:g}"] == min(row["lr_grid"].values())
        tests = [line for line in lines.values() if (line["method"], line["stage"]) == (row["method"], "test")]
        assert row["values"] == [line["test"]["accuracy"] for line in tests]
        assert row["mean"] == pytest.approx(np.mean(row["values"]))
        assert all(line["parameters"] <= size for line in tests)
        assert f"• {row['sentence']}" in shown
        assert "With 2 seeds the interval is not trustworthy" in row["sentence"] or row["difference"] is None
    assert result["rows"][1]["difference"]["mean"] == pytest.approx(
        result["rows"][1]["mean"] - result["rows"][0]["mean"]
    )
    assert result["sentence"] in (out / "table.md").read_text()
    # the tuning runs never saw the test data, and the test runs have other seeds
    assert {line["seed"] for line in lines.values() if line["test"]} == {0, 1}
    assert {line["seed"] for line in lines.values() if not line["test"]} == {100}
    table = pq.read_table(out / "runs.parquet").to_pylist()
    assert len(table) == 3 * 4
    assert {row["stage"] for row in table} == {"tuning", "test"}
    first = next(row for row in table if row["stage"] == "test")
    assert sum(rank for _, rank in first["ranks"]) == 4
    assert first["test_accuracy"] is not None
    assert first["task"].endswith("sentiment0")

    before = (out / "results.jsonl").read_bytes()
    again = run.invoke(app, [*command, "--json"])
    assert json.loads(again.stdout) == result
    assert "12 runs; 12 are finished" in again.stderr
    assert (out / "results.jsonl").read_bytes() == before
    plan = run.invoke(app, ["compare", str(file), "--dry-run"])
    assert "AdaLoRA, budget 2 per module, lr 0.001, seed 100, tuning" in plan.stdout
    assert "from the runs that are finished" in " ".join(plan.stdout.split())


def test_jobs_give_the_same_results(file: Path, tmp_path: Path) -> None:
    content = yaml.safe_load(file.read_text())
    # one rate and one seed: a single process is started, since each takes seconds
    content |= {"methods": {"LoRA": METHODS["LoRA"]}, "budgets": [1], "lrs": [1e-3], "seeds": [0], "references": []}
    file.write_text(yaml.safe_dump(content))
    results = []
    for jobs in (1, 2):
        comparison = read_comparison(file, [f"output_dir={tmp_path / str(jobs)}"])
        subject = make_subject(comparison)
        known = run_comparison(comparison, subject, jobs=jobs)
        results.append({name: (line["validation_loss"], line["test"]) for name, line in known.items()})
        assert len(list((tmp_path / str(jobs) / "losses").iterdir())) == 1
    assert results[0] == results[1]
    assert len(results[0]) == 2


def test_losses_of_examples_add_up_to_the_mean_loss(make: Any) -> None:
    generation = {
        "name": "generation",
        "data": str(make().task.data),
        "prompt": "{label}",
        "target": "{text}",
        "max_new_tokens": 4,
    }
    for config in (make(), make(task=generation)):
        task = task_of(config)
        model = load_model(config.model, task)
        found = example_losses(model, task.test, task, batch_size=5)
        expected = mean_loss(model, task.test, task.collator, batch_size=3, progress=False)
        assert found["losses"].sum() / found["labels"].sum() == pytest.approx(expected, rel=1e-5)
        if config.task.name == "generation":
            assert len(set(found["groups"].tolist())) == 2, "one group for each of the two prompts"
        else:
            accuracy = task.evaluate(model, "test", progress=False)["accuracy"]
            assert found["correct"].mean() == pytest.approx(accuracy)
            assert len(set(found["groups"].tolist())) == len(task.test)


def test_a_run_that_fails_is_a_result_and_a_mistake_is_not(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(error: Exception) -> None:
        def failing(*_: Any, **__: Any) -> Any:
            raise error

        monkeypatch.setattr(recipe_runs, "train_", failing)

    _, trials = trials_of(read_comparison(file))
    trial = next(iter(trials.values()))
    fail(NonFiniteError("the loss is NaN"))
    line = recipe_runs.run_trial(trial, file.parent)
    assert (line["failure"], line["validation_loss"]) == ("NonFiniteError: the loss is NaN", None)
    assert recipe_runs.selection_loss(line) == math.inf
    fail(BudgetError("the budget is too large"))
    with pytest.raises(BudgetError, match="too large"):
        recipe_runs.run_trial(trial, file.parent)


def answered(comparison: Comparison, loss: Any) -> tuple[Any, dict[str, Any]]:
    """A finished comparison with lines that ``loss`` makes: (trial) → (validation loss, accuracy, parameters)."""
    subject, known = make_subject(comparison), {}
    while True:
        missing = [t for t in wanted_runs(comparison, subject, known).trials if t.fingerprint not in known]
        if not missing:
            return subject, known
        for trial in missing:
            validation, accuracy, parameters = loss(trial)
            known[trial.fingerprint] = {
                **{"fingerprint": trial.fingerprint, "task": "t", "method": trial.method, "budget": trial.budget},
                **{"lr": trial.lr, "seed": trial.seed, "stage": trial.stage, "failure": None, "seconds": 1.0},
                **{"validation_loss": validation, "test": {"accuracy": accuracy} if trial.stage == "test" else {}},
                **{"parameters": parameters, "most_parameters": parameters, "ranks": {"q": 1}},
            }
            if accuracy is None:
                known[trial.fingerprint]["failure"] = "NonFiniteError: it diverged"


def test_what_is_told(file: Path, tmp_path: Path) -> None:
    comparison = read_comparison(file, ["budgets=[1]", "seeds=[0,1,2]", "growth=1"])

    def loss(trial: Any) -> tuple[float, float | None, int]:
        config = trial.run_config("-")
        size = config.allocator.budget.parameters
        gain = {"balanced": 0.1, "adalora": -0.2}.get(config.allocator.name, 0.2 * (trial.config.count('"r": 2')))
        accuracy = None if trial.method == "AdaLoRA" and trial.seed == 1 else 0.5 + gain + 0.01 * trial.seed
        return trial.lr, accuracy, size // 2 if trial.method == "Balanced" else size

    subject, known = answered(comparison, loss)
    result = assess(comparison, subject, known)
    rows = {row["method"]: row for row in result["rows"]}
    balanced = rows["Balanced"]
    assert balanced["difference"]["mean"] == pytest.approx(0.1)
    assert balanced["difference"]["real"]
    assert balanced["equivalent_k"] == pytest.approx(math.sqrt(2))
    assert "a real difference, for the better; as LoRA with 1.4 times the parameters." in balanced["sentence"]
    assert balanced["notes"][0].startswith("ends with")
    assert "50.0% fewer than the budget's" in balanced["notes"][0]
    assert "at an end of the grid" in balanced["notes"][1]
    assert balanced["lr_grid"] == {"0.0005": 0.0005, "0.001": 0.001, "0.002": 0.002}
    assert rows["AdaLoRA"]["mean"] is None
    assert "a run failed" in rows["AdaLoRA"]["sentence"]
    assert rows["AdaLoRA"]["notes"][-1] == "failed, seed 1: NonFiniteError: it diverged"
    assert "BalancedLoRA is best (accuracy 0.61); better: BalancedLoRA." in result["sentence"]
    json.loads(json.dumps(result, allow_nan=False))
    text = markdown(result)
    assert "| BalancedLoRA * | 0.6100 ± 0.0058 | +0.1 | +0.1 to +0.1 |" in text
    assert "| AdaLoRA * | failed | |" in text.replace("|  |", "| |")
    assert rich_tables(result)[0].row_count == 4
    files = write_results(result, tidy_rows(comparison, subject, known), tmp_path / "told")
    assert [path.name for path in files] == ["comparison.json", "table.md", "runs.parquet"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["metric=bleu"], "metric 'bleu': the task classification has loss, accuracy"),
        (["budgets=[lots]"], "budgets: budget 'lots': expected 8"),
        (["budgets=[900]"], "is more than the"),
        (["task.test_split=null"], "no test split"),
    ],
)
def test_what_does_not_fit_the_model_shows_before_the_first_run(file: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(Exception, match=message):
        make_subject(read_comparison(file, overrides))


def test_the_command_says_what_is_wrong(file: Path, tmp_path: Path) -> None:
    run = CliRunner(env={"COLUMNS": "200"})
    out = tmp_path / "foreign"
    out.mkdir()
    (out / "table.md").write_text("mine")
    for arguments, message in (
        (["seeds=[0]"], "name a comparison"),
        ([str(file), "--methods", "none"], "is not one of the methods"),
        ([str(file), str(file), "output_dir=x"], "run them one by one"),
        ([str(file), f"output_dir={out}"], "table.md would be replaced"),
    ):
        done = run.invoke(app, ["compare", *arguments])
        assert done.exit_code == 2, done.output
        assert message in " ".join(done.stderr.split())
    assert [path.name for path in out.iterdir()] == ["table.md"]


def test_planted_ranks_are_a_comparison_too(tmp_path: Path) -> None:
    from lorank.experiments.compare.planted_subject import planted_subject

    content = {"task": "planted", "planted": {"steps": 20}, "methods": {"uniform": None, "oracle": None}}
    file = tmp_path / "planted.yaml"
    content |= {"seeds": [0], "references": [1, 2], "output_dir": str(tmp_path / "o")}
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    comparison = read_comparison(file)
    subject = planted_subject(comparison)
    assert [entry.title for entry in subject.entries] == [
        "LoRA, uniform",
        "LoRA, true ranks",
        "LoRA, uniform",
        "LoRA, 2 × the ranks",
    ]
    assert len(subject.contenders) == 3

    def work(trial: Any) -> dict[str, Any]:
        test = {"uniform": 0.5, "oracle": 0.1, "uniform*2": 0.2}[trial.method]
        return {
            **{"scenario": "modules", "method": trial.method, "lr": trial.lr, "knob": None, "seed": trial.seed},
            **{"failure": None, "test": test + trial.seed / 100, "selection": trial.lr, "ranks": {"a": 1}},
            **{"parameters": [20, 10], "overlap": 0.5, "scoring": 0.1, "seconds": 1.0},
        }

    result, rows = finished(comparison, dataclasses.replace(subject, work=work))
    assert [row["title"] for row in result["rows"]] == ["LoRA, uniform", "LoRA, true ranks", "LoRA, 2 × the ranks"]
    assert [row["mean"] for row in result["rows"]] == [0.5, 0.1, 0.2]
    assert "one seed gives no interval" in result["rows"][1]["sentence"]
    assert result["rows"][0]["lr_grid"] == {"0.01": 0.01, "0.02": 0.02}
    assert {row["stage"] for row in rows} == {"tuning", "test"}
    assert {row["parameters"] for row in rows} == {10}


def finished(comparison: Comparison, subject: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    known = run_comparison(comparison, subject)
    return assess(comparison, subject, known), tidy_rows(comparison, subject, known)
