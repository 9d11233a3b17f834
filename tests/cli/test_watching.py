"""What a user asks around a run: show, doctor, init, dry runs, JSON, and hints for what was written differently."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

import lorank
from lorank.cli.app import app
from tests.models import adapted, tiny_llama, token_batch
from tests.training.loops import adamw


def call(*arguments: object, given: str | None = None) -> Result:
    return CliRunner(env={"COLUMNS": "300", "LORANK_DATA": None}).invoke(app, list(map(str, arguments)), input=given)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of a raw loop: a history, the adapter, and an adapter alone in another folder."""
    folder = tmp_path_factory.mktemp("shown")
    model = adapted(tiny_llama(), random_B=False)
    optimizer = adamw(model)
    ranks = lorank.attach(
        model,
        optimizer,
        lorank.ALoRA(k1=1, k2=1, rounds=2, unit="steps", budget="100% of adapter"),
        validation_batch=token_batch(seed=9),
        total_steps=3,
        history_path=folder / "run" / "rank_history.jsonl",
    )
    for step in range(3):
        model(**token_batch(seed=step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step == 0:
            ranks.save_adapter(folder / "run" / "checkpoint-1")
    ranks.save_adapter(folder / "run" / "adapter")
    ranks.save_adapter(folder / "alone")
    (folder / "run" / "expected.txt").write_text(str(ranks.summary()))
    return folder / "run"


def test_show_says_what_the_run_itself_said(run: Path) -> None:
    expected = (run / "expected.txt").read_text()
    for place in (run, run / "rank_history.jsonl", run / "adapter"):
        shown = call("show", place)
        assert shown.exit_code == 0, shown.output
        assert shown.stdout.startswith(expected)
        assert "projection" in shown.stdout
    listed = call("show", run, "--all").stdout
    assert all(name in listed for name in lorank.read_history(run / "rank_history.jsonl")[-1].ranks)


def test_show_as_json_and_of_a_checkpoint(run: Path) -> None:
    last, first = (json.loads(call("show", place, "--json").stdout) for place in (run, run / "checkpoint-1"))
    history = {record.step: record for record in lorank.read_history(run / "rank_history.jsonl")}
    assert {name: own["rank"] for name, own in last["modules"].items()} == history[2].ranks
    assert {name: own["rank"] for name, own in first["modules"].items()} == history[1].ranks


def test_show_an_adapter_without_a_history(run: Path) -> None:
    shown = call("show", run.parent / "alone")
    assert shown.exit_code == 0, shown.output
    assert "nothing is known about how they came there" in shown.stdout
    ranks = lorank.read_history(run / "rank_history.jsonl")[-1].ranks
    values = json.loads(call("show", run.parent / "alone", "--json").stdout)
    assert values["ranks"] == sum(ranks.values())
    assert values["modules"] == {name: rank for name, rank in ranks.items() if rank}
    refused = call("show", run.parent)
    assert refused.exit_code == 2
    assert "has no rank_history.jsonl and no adapter_config.json" in refused.stderr


def test_resize_as_json(run: Path, tmp_path: Path) -> None:
    done = call("resize", run.parent / "alone", "--budget", "50%", "--out", tmp_path / "half", "--json")
    assert done.exit_code == 0, done.output
    values = json.loads(done.stdout)
    assert values["parameters"][1] <= values["parameters"][0] / 2
    assert values["folder"] == str(tmp_path / "half")


def test_doctor_lists_what_is_there_and_how_to_get_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    from lorank.cli import doctor

    monkeypatch.setattr(doctor, "OPTIONAL", ("nothing_of_this_name", "trl"))
    values = json.loads(call("doctor", "--json").stdout)
    checks = {(check["area"], check["what"]): check for check in values["checks"]}
    assert checks["versions", "lorank"]["found"] == values["lorank"] == lorank.__version__
    assert checks["versions", "torch"]["state"] == "yes"
    absent = checks["packages", "nothing_of_this_name"]
    assert (absent["state"], absent["found"]) == ("no", "not installed")
    assert absent["remedy"].startswith("pip install")
    assert {area for area, _ in checks} == {"versions", "speed", "device", "packages", "extras", "data"}
    assert "oneDNN" in call("doctor").stdout


@pytest.mark.parametrize(
    ("data", "more", "kind"),
    [
        ("e2e_nlg", [], "generation"),
        ("clinc150", [], "classification"),
        ("python_reference", [], "language_modelling"),
        ("classics", [], "language_modelling"),
        ("facts", [], "generation"),
        ("digits", [], "image_classification"),
        ("owner/name", ["--task", "classification"], "classification"),
        ("owner/name", ["--task", "generation"], "generation"),
        ("owner/name", ["--task", "language_modelling"], "language_modelling"),
    ],
)
def test_init_writes_a_recipe_that_train_accepts(tmp_path: Path, data: str, more: list[str], kind: str) -> None:
    from lorank.config import load_config

    file = tmp_path / "mine.yaml"
    done = call("init", file, "--model", "tiny", "--data", data, "--budget", "50% of adapter", *more)
    assert done.exit_code == 0, done.output
    config = load_config(file)
    assert (config.task.name, config.task.data, config.model.name) == (kind, data, "tiny")
    assert config.allocator.name == "balanced"
    assert config.allocator.budget.named == {"percent_of_adapter": 50}  # type: ignore[union-attr]
    assert "#" in file.read_text()
    before = file.read_text()
    again = call("init", file, "--model", "tiny", "--data", data, "--budget", "8", *more)
    assert again.exit_code == 2
    assert "--force" in again.stderr
    assert file.read_text() == before
    assert call("init", file, "--force", "--model", "tiny", "--data", data, "--budget", "8", *more).exit_code == 0
    assert load_config(file).allocator.budget.named == {"ranks_per_module": 8}  # type: ignore[union-attr]


def test_init_asks_on_a_terminal_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "mine.yaml"
    refused = call("init", file, "--model", "tiny", "--data", "e2e_nlg")
    assert "--budget is missing, and there is no terminal" in refused.stderr
    assert "did you mean e2e_nlg?" in call("init", file, "--model", "tiny", "--data", "e2e_nlgg", "--budget", 8).stderr
    assert "--budget" in refused.stderr
    assert not file.exists()
    monkeypatch.setattr("lorank.cli.init._on_terminal", lambda: True)
    asked = call("init", file, given="tiny\npython_reference\n\n")
    assert asked.exit_code == 0, asked.output
    assert "100% of adapter" in file.read_text()


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    file, texts = tmp_path / "recipe.yaml", tmp_path / "texts"
    texts.mkdir()
    (texts / "train.jsonl").write_text("".join(json.dumps({"text": f"sentence {i}"}) + "\n" for i in range(80)))
    done = call("init", file, "--model", "tiny", "--data", texts, "--task", "language_modelling",
                "--budget", "100% of adapter")  # fmt: skip
    assert done.exit_code == 0, done.output
    return file


SHORT = ("task.block_size=16", "task.max_train=8", "task.max_eval=4", "training.batch_size=2", "training.epochs=1")


def test_a_dry_run_checks_everything_and_writes_nothing(recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    done = call("train", recipe, *SHORT, f"output_dir={out}", "task.test_split=null", "--dry-run", "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert not out.exists()
    assert found["steps"] == 4
    assert found["start"]["ranks"] > found["made"]["ranks"] == 42 * 8  # BalancedLoRA begins wide
    assert found["budget"]["percent_of_adapter"]["limit"] == pytest.approx(100)
    assert found["seconds_per_step"] > 0
    shown = call("train", recipe, *SHORT, f"output_dir={out}", "task.test_split=null", "--dry-run")
    assert "% of adapter" in shown.stdout
    assert "checked, nothing was written" in " ".join(shown.stdout.split())
    assert "without a single allocation" not in shown.output  # of a run that did not take place
    wrong = call("train", recipe, *SHORT, f"output_dir={out}", "lora.target_modules=[nothing]", "--dry-run")
    assert wrong.exit_code == 2
    assert "lora.target_modules" in wrong.stderr


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["--training.lr", "1e-3"], "training.lr=1e-3"),
        (["--lr=1e-3"], "training.lr=1e-3"),
        (["--learning-rate", "1e-3"], "training.lr=1e-3"),
        (["--output-dir", "runs/a"], "output_dir=runs/a"),
        (["--allocator.rounds", "4"], "allocator.rounds=4"),
        (["--config", "mine.yaml"], "The configuration is the first argument"),
        (["--dry_run"], "Did you mean --dry-run?"),
        (["--overwrit"], "Did you mean --overwrite?"),
    ],
)
def test_settings_written_as_options_get_the_right_spelling(arguments: list[str], hint: str) -> None:
    result = call("train", "e2e_alora", *arguments)
    assert result.exit_code == 2
    assert hint in " ".join(result.stderr.replace("│", " ").split())


def test_an_unknown_option_without_a_meaning_stays_an_error() -> None:
    result = call("train", "e2e_alora", "--nonsense")
    assert result.exit_code == 2
    assert "No such option" in result.stderr


def test_a_nearly_known_data_set_is_named_before_the_keys_that_it_would_set() -> None:
    result = call("train", "e2e_alora", "task.data=e2e_nlgg")
    assert result.exit_code == 2
    assert "did you mean e2e_nlg?" in result.stderr
    assert "task.prompt" not in result.stderr
