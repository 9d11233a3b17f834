"""Folders of finished runs, written by hand: what `lorank report` reads, without any training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from lorank.training.history import Record
from tests.report.runs import NAMES, made_run

SHAPES = dict.fromkeys(NAMES, (60, 40))
METRICS: dict[str, Any] = {
    "lorank": "0.1.0",
    "model": "tiny",
    "data": "e2e_nlg",
    "steps": 40,
    "best_step": 40,
    "note": None,
    "final": {"ranks": 51, "modules": 12, "trainable_parameters": 5100},
    "validation": {"loss_before": 5.5, "loss_after": 3.25},
    "test": {"loss": 3.5, "bleu": 20.0},
    "seconds": {"training": 100.0, "scoring": 4.0, "final_evaluation": 8.0},
}
CONFIG: dict[str, Any] = {
    "model": {"name": "tiny"},
    "lora": {"r": 4, "alpha": 8.0, "target_modules": "all-linear"},
    "task": {"name": "generation", "data": "e2e_nlg"},
    "allocator": {"name": "balanced", "budget": None, "wide": 4.0, "cuts": 5},
    "training": {"lr": 0.01, "scheduler": "linear", "batch_size": 16, "seed": 0},
    "output_dir": "runs/x",
}


def records() -> list[Record]:
    """The records of `made_run`."""
    run = made_run()
    assert run.worth is not None
    found = []
    for frame in run.frames:
        moved = {NAMES[0]: [0, 1]} if frame.step else {}
        budget = {"percent_of_adapter": {"used": 98.0, "limit": 100.0}}
        details = {"head_ranks": dict(frame.heads), "budget": budget} if frame.step else {"begins": True}
        scores = run.worth.scores if frame.step == 30 else {}
        added = {NAMES[2]: 2} if frame.step else {}
        found.append(Record(frame.step, "BalancedLoRA", frame.ranks, SHAPES, moved, added, scores, 0.5, details))
    return found


def write_history(folder: Path) -> Path:
    """A history as any training loop leaves it."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "rank_history.jsonl"
    path.write_text("".join(f"{record.to_json()}\n" for record in records()))
    return path


def write_run(folder: Path, *, seed: int = 0, loss: float = 3.5, config: dict[str, Any] | None = None) -> Path:
    """The folder of a finished run of `lorank train`."""
    write_history(folder)
    settings = {**CONFIG, **(config or {})}
    settings["training"] = {**settings["training"], "seed": seed}
    (folder / "config.yaml").write_text(yaml.safe_dump({**settings, "output_dir": str(folder)}))
    metrics = {**METRICS, "seed": seed, "test": {**METRICS["test"], "loss": loss}}
    (folder / "metrics.json").write_text(json.dumps(metrics))
    log = [{"step": step, "loss": 5 - 0.05 * step} for step in range(5, 41, 5)]
    log += [{"step": 20, "eval_loss": 4.1}, {"step": 40, "eval_loss": 3.25}, {"step": 40, "train_runtime": 3}]
    (folder / "log_history.jsonl").write_text("".join(f"{json.dumps(entry)}\n" for entry in log))
    (folder / "adapter").mkdir()
    (folder / "adapter" / "adapter_model.safetensors").write_bytes(bytes(2000))
    return folder
