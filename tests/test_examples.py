"""The examples run as they stand, only shorter."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

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


def test_torchrun_in_two_processes(tmp_path: Path) -> None:
    script, out = EXAMPLES / "torchrun_loop.py", tmp_path / "adapter"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    source = str(Path(lorank.__file__).parents[1])
    done = subprocess.run(
        [*command, str(script), "--steps", "5", "--output", str(out)],
        env={**os.environ, "PYTHONPATH": source, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "step 5: loss" in done.stdout
    assert (out / "adapter_model.safetensors").is_file()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_accelerate_in_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`accelerate launch` runs it in many; test_distributed.py and trainer_run.py do."""
    monkeypatch.setattr(sys, "argv", ["accelerate_loop.py", "--steps", "4", "--output", str(tmp_path / "adapter")])
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    runpy.run_path(str(EXAMPLES / "accelerate_loop.py"), run_name="__main__")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
