"""The examples run as they stand, only shorter."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import lorank

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_any_loop(tmp_path: Path) -> None:
    ranks = runpy.run_path(str(EXAMPLES / "any_loop.py"))["main"](steps=4, output=str(tmp_path / "adapter"))
    assert len(ranks.history.allocations) == 2
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_trl_sft(tmp_path: Path) -> None:
    pytest.importorskip("trl")
    callback = runpy.run_path(str(EXAMPLES / "trl_sft.py"))["main"](steps=3, samples=2, length=24, output=str(tmp_path))
    assert len(callback.ranks.history.allocations) == 2


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


def test_torchrun_in_two_processes(tmp_path: Path) -> None:
    assert "step 5: loss" in torchrun("torchrun_loop.py", tmp_path, "--steps", "5", "--output", "adapter")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
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


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_accelerate_in_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`accelerate launch` runs it in many; test_ddp.py and trainer_run.py do."""
    monkeypatch.setattr(sys, "argv", ["accelerate_loop.py", "--steps", "4", "--output", str(tmp_path / "adapter")])
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    runpy.run_path(str(EXAMPLES / "accelerate_loop.py"), run_name="__main__")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
