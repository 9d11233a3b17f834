"""A mistake that can be found without a model is found before torch, transformers and PEFT are imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

WITHOUT_TORCH = """
import sys
for heavy in ("torch", "transformers", "peft", "datasets"):
    sys.modules[heavy] = None  # importing it is an error
from lorank.cli.main import main
main()
"""

CONFIG = {
    "model": {"name": "tiny"},
    "task": {"name": "classification", "data": "rotten_tomatoes"},
    "allocator": {"name": "alora"},
    "output_dir": "runs/x",
}


def lorank(*arguments: str, folder: Path) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    return done.returncode, " ".join((done.stdout + done.stderr).split())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(CONFIG))
    (tmp_path / "wrong.yaml").write_text(yaml.safe_dump({**CONFIG, "trainig": {"lr": 1}, "lora": {"r": 0}}))
    (tmp_path / "no.yaml").write_text("a: [")
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump({"base": "nowhere", "output_dir": "out"}))
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "nope.yaml"], "nope.yaml: there is no such file. Give your own YAML file or the name of a recipe"),
        (["train", "no.yaml"], "no.yaml is not YAML"),
        (["train", "wrong.yaml"], "2 errors"),
        (["train", "run.yaml", "training.lr"], "expected key=value"),
        (["train", "run.yaml", "training.lr=fast"], "training.lr"),
        (["train", "run.yaml", "output_dir=full"], "output_dir full is not empty"),
        (["train", "run.yaml", "--overwrite", "output_dir=full"], "holds no run"),
        (["train", "run.yaml", "--resume"], "there is no run in runs/x"),
        (["train", "run.yaml", "--resume", "--overwrite"], "give only one of them"),
        (["score", "nowhere"], "nowhere: there is no such folder"),
        (["score", "full"], "full has no adapter_config.json"),
        (
            ["score", "adapter", "--by", "magic"],
            "--by 'magic': expected one of balanced, ablation, first_order, screen",
        ),
        (["prune", "adapter", "--out", "full", "--budget", "50%"], "--out full already exists"),
        (["prune", "adapter", "--out", "adapter", "--budget", "50%"], "--out adapter is the adapter itself"),
        (["prune", "adapter", "--out", "new"], "give a budget"),
        (["prune", "adapter", "--out", "new", "--budget", "8", "--config", "no"], "there is no such file"),
        (
            ["prune", "adapter", "--out", "new", "--budget", "8", "--by", "saliency", "--stages", "2"],
            "leave --stages out",
        ),
        (["resize", "adapter", "--out", "new"], "give one size: --rank 8"),
        (["resize", "adapter", "--out", "full", "--rank", "2"], "--out full already exists"),
        (["resize", "full", "--out", "new", "--rank", "2"], "full has no adapter_config.json"),
        (["export", "adapter", "--out", "new"], "give a form: --form peft, tight, uniform"),
        (["export", "adapter", "--form", "tight"], "give a folder for the result"),
        (["export", "adapter", "--form", "gguf", "--out", "adapter"], "--out adapter is the adapter itself"),
        (["export", "full", "--check"], "full has no adapter_config.json"),
        (["merge", "adapter", "--out", "new"], "cannot be merged: give two or more"),
        (["merge", "adapter", "adapter", "--weights", "1", "--out", "new"], "has 1 numbers for 2 adapters"),
        (["curve", "nope.yaml"], "there is no such file"),
        (["curve", "adapter", "--rank", "8"], "an adapter is measured as it is"),
        (["curve", "run.yaml", "--data", "x"], "--data is for adapters"),
        (["sweep", "nope.yaml"], "there is no such file"),
        (["sweep", "sweep.yaml"], "base: "),
        (["sweep", "run.yaml"], "error"),
        (["sweep", "ard_ablation", "--storage", "trials.db"], "'trials.db' is not the URL of a database"),
        (["sweep", "ard_ablation", "sampler=tpe"], "sampler tpe needs the number of trials"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_found_without_torch(arguments: list[str], message: str, folder: Path) -> None:
    before = sorted(folder.rglob("*"))
    status, output = lorank(*arguments, folder=folder)
    assert status == 2, output
    assert message in output
    assert sorted(folder.rglob("*")) == before


def test_python_m_lorank(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "lorank", "--version"], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert done.stdout.startswith("lorank ")
