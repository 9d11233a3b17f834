"""The command line as a user meets it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner, Result

from lorank import __version__
from lorank.cli.app import app


def lorank(*arguments: str) -> Result:
    # wide enough that messages are not broken into lines
    return CliRunner(env={"COLUMNS": "400", "LORANK_DATA": None}).invoke(app, list(arguments))


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    rows = [{"text": f"a {word} film", "label": label} for word, label in (("good", 1), ("bad", 0))] * 12
    for split in ("train", "validation", "test"):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = tmp_path / "recipe.yaml"
    path.write_text(
        yaml.safe_dump(
            {
                "model": {"name": "tiny"},
                "lora": {"r": 2, "alpha": 4, "target_modules": ["q_proj"]},
                "task": {"name": "classification", "data": str(tmp_path)},
                "allocator": {"name": "alora", "k1": 2, "rounds": 1, "unit": "steps", "per_round": 2},
                "allocator_samples": 4,
                "training": {"epochs": 1, "batch_size": 6, "eval_steps": 2, "lr": 1e-3},
                "output_dir": str(tmp_path / "run"),
            }
        )
    )
    return path


def test_help_teaches_with_examples() -> None:
    assert "lorank train e2e_alora training.lr=3e-4" in lorank("--help").output
    assert "allocator={name: static}" in lorank("train", "--help").output
    assert "--seed" in lorank("demo", "--help").output


def test_version() -> None:
    assert lorank("--version").output == f"lorank {__version__}\n"


def test_schema_is_json() -> None:
    assert json.loads(lorank("schema").stdout)["title"] == "RunConfig"


def test_train_prints_what_was_reached(recipe: Path, tmp_path: Path) -> None:
    result = lorank("train", str(recipe), "training.lr=3e-3")
    assert result.exit_code == 0, result.output
    for line in ("total rank", "trainable parameters", "validation loss", "test accuracy", str(tmp_path / "run")):
        assert line in result.stdout
    assert "step 4/4: validation loss" in result.stderr
    # and once more, which would lose the first run
    again = lorank("train", str(recipe))
    assert again.exit_code == 2
    assert "is not empty" in again.stderr
    assert "--overwrite" in again.stderr
    assert lorank("train", str(recipe), "--overwrite").exit_code == 0


@pytest.mark.parametrize(
    ("changes", "messages"),
    [
        (["traning.lr=1", "lora.rank=3"], ["2 errors", "did you mean training?", "did you mean lora.r?"]),
        (["training.lr"], ["'training.lr': expected key=value"]),
        (["task.label=lable"], ["there is no column 'lable'", "'text', 'label'"]),
        (["task.data=./nowhere"], ["no such file or folder"]),
        (["task.test_split=dev"], ["no split 'dev'", "test, train, validation"]),
        (["model.name=./nothing"], ["'./nothing' cannot be loaded"]),
        (["allocator.rounds=0"], ["allocator.rounds: expected at least 1"]),
    ],
)
def test_mistakes_become_one_message_and_status_2(recipe: Path, changes: list[str], messages: list[str]) -> None:
    result = lorank("train", str(recipe), *changes)
    assert result.exit_code == 2
    for message in messages:
        assert message in result.stderr
    assert "Traceback" not in result.output


def test_a_recipe_that_is_not_there() -> None:
    result = lorank("train", "nowhere.yaml")
    assert result.exit_code == 2
    assert "nowhere.yaml: there is no such file" in result.stderr


def test_the_installed_command(recipe: Path, tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-c",
        "from lorank.cli.main import main; main()",
        "train",
        str(recipe),
        "training.max_steps=2",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "test accuracy" in done.stdout
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()
