"""The examples and notebooks run as they stand, only shorter."""

from __future__ import annotations

import json
import math
import os
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import lorank

EXAMPLES = Path(__file__).parents[1] / "examples"
pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning", "ignore::ResourceWarning"
)


def main_of(script: str) -> Callable[..., Any]:
    main: Callable[..., Any] = runpy.run_path(str(EXAMPLES / script))["main"]
    return main


def card(folder: Path) -> str:
    assert (folder / "adapter_model.safetensors").is_file()
    return (folder / "README.md").read_text(encoding="utf-8")


def test_raw_loop(tmp_path: Path) -> None:
    ranks = main_of("raw_loop.py")(steps=12, rows=2, length=24, output=str(tmp_path / "adapter"))
    assert len(ranks.history.allocations) == 3
    assert "| Method | BalancedLoRA |" in card(tmp_path / "adapter")


def test_trl_sft(tmp_path: Path) -> None:
    pytest.importorskip("trl")
    callback = main_of("trl_sft.py")(steps=4, length=24, output=str(tmp_path))
    assert callback.ranks.history.allocations
    assert "| Data | Python's reference manual |" in card(tmp_path / "adapter")


def test_trl_dpo_begins_at_the_reference_model_and_learns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("trl")
    callback = main_of("trl_dpo.py")(steps=4, rows=16, length=12, logging_steps=1, output=str(tmp_path))
    assert callback.ranks.history.allocations
    log = json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())["log_history"]
    losses = [entry["loss"] for entry in log if "loss" in entry]
    assert losses[0] == pytest.approx(math.log(2), abs=2e-3)  # the reference is the model without its adapter
    assert losses[-1] < losses[0]
    assert "BalancedLoRA" in card(tmp_path / "adapter")


def test_classifier(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    trainer = main_of("classifier.py")(steps=4, name=lorank_tiny(), output=str(tmp_path))
    metrics = trainer.evaluate()
    assert 0 <= metrics["eval_accuracy"] <= 1
    assert "| Data | docstrings of str, int" in card(tmp_path / "adapter")


def lorank_tiny() -> str:
    return str(Path(lorank.__file__).parent / "assets" / "tiny_llama")


def test_vit(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    ranks = main_of("vit.py")(base_steps=2, steps=12, rows=16, output=str(tmp_path / "adapter"))
    assert len(set(ranks.layers.ranks.values())) > 1
    assert "turned by 90 degrees" in card(tmp_path / "adapter")


@pytest.mark.parametrize("name", ["first_run", "which_rank"])
def test_notebook(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    pytest.importorskip("altair")
    pytest.importorskip("vl_convert")
    notebook = nbformat.read(EXAMPLES / f"{name}.ipynb", as_version=4)
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in notebook.cells)  # a small file
    setup = notebook.cells[1]
    assert "STEPS = 100" in setup.source
    setup.source = setup.source.replace("STEPS = 100", "STEPS = 12").replace("(8,)", "(2,)").replace(":64]", ":16]")
    monkeypatch.setenv("PYTHONPATH", str(Path(lorank.__file__).parents[1]))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    printed = "".join(out.get("text", "") for cell in notebook.cells for out in cell.get("outputs", []))
    assert "loss" in printed
    assert any("image/png" in out.get("data", {}) for cell in notebook.cells for out in cell.get("outputs", []))


def torchrun(script: str, folder: Path, *arguments: str) -> str:
    """What it prints in two processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    source = str(Path(lorank.__file__).parents[1])
    done = subprocess.run(
        [*command, str(EXAMPLES / script), *arguments],
        env={**os.environ, "PYTHONPATH": source, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


TORCHRUN_LOOP = ["torchrun_loop.py", "--steps", "5", "--output", "adapter"]


def test_torchrun_in_two_processes(tmp_path: Path) -> None:
    assert "step 5: loss" in torchrun(TORCHRUN_LOOP[0], tmp_path, *TORCHRUN_LOOP[1:])
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


def test_torchrun_in_one_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The process that torchrun starts, with the variables that it sets; test_ddp.py has two processes."""
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", TORCHRUN_LOOP)
    runpy.run_path(str(EXAMPLES / TORCHRUN_LOOP[0]), run_name="__main__")
    assert "step 5: loss" in capsys.readouterr().out
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


def test_the_trainer_on_a_base_model_that_transformers_sharded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ranks and losses of one process, where nothing is sharded."""
    torchrun("trainer_fsdp.py", tmp_path, "--steps", "5", "--output", "two")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["trainer_fsdp.py", "--steps", "5", "--output", "one"])
    runpy.run_path(str(EXAMPLES / "trainer_fsdp.py"), run_name="__main__")
    losses, ranks = [], []
    for run in ("one", "two"):
        state = json.loads((tmp_path / run / "checkpoint-5" / "trainer_state.json").read_text())
        losses.append([entry["loss"] for entry in state["log_history"] if "loss" in entry])
        ranks.append([record.ranks for record in lorank.read_history(tmp_path / run / "rank_history.jsonl")])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert len(losses[0]) == 5
    assert ranks[0] == ranks[1]
    assert ranks[0][-1] != ranks[0][0]
    saved = [load_file(tmp_path / run / "checkpoint-5" / "adapter_model.safetensors") for run in ("one", "two")]
    assert saved[0].keys() == saved[1].keys()
    for key, value in saved[0].items():
        torch.testing.assert_close(saved[1][key], value, rtol=1e-4, atol=1e-5)


def test_accelerate_in_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`accelerate launch` runs it in many; test_ddp.py and trainer_run.py do."""
    monkeypatch.setattr(sys, "argv", ["accelerate_loop.py", "--steps", "4", "--output", str(tmp_path / "adapter")])
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    runpy.run_path(str(EXAMPLES / "accelerate_loop.py"), run_name="__main__")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
