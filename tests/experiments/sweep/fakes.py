"""Runs that take no time, and a worker process that takes some.

python -m tests.experiments.sweep.fakes SWEEP URL
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from rich.console import Console

from lorank.config.settings import RunConfig, to_yaml
from lorank.experiments.folder_check import CONFIG, METRICS
from lorank.experiments.sweep import load_sweep, run_sweep
from lorank.experiments.sweep.jobs import Place

HEARTBEAT, GRACE, STEPS = 1, 4, 10
CALLS = "calls.txt"


def metrics_of(config: RunConfig) -> dict[str, Any]:
    """A loss that is lowest at rank 4 and learning rate 0.01, and one parameter per rank."""
    import math

    rank, lr, seed = config.lora.r, config.training.lr, config.training.seed
    loss = 1 + abs(math.log2(rank / 4)) / 4 + math.log10(lr / 0.01) ** 2 / 4 + seed / 1000
    return {
        "validation": {"loss_before": 3.0, "loss_after": loss},
        "test": {"loss": loss + 0.1},
        "final": {"trainable_parameters": 100 * rank, "ranks": rank},
        "seconds": {"training": 0.5},
    }


def fast(config: RunConfig, **options: Any) -> Any:
    """Writes what a run writes, and returns at once; like the real run, it refuses a folder with another run."""
    place = Path(config.output_dir)
    assert (place / CONFIG).is_file() == options["resume"]
    place.mkdir(parents=True, exist_ok=True)
    (place / CONFIG).write_text(to_yaml(config), encoding="utf-8")
    metrics = metrics_of(config)
    (place / METRICS).write_text(json.dumps(metrics))
    return SimpleNamespace(metrics=metrics)


def slow(config: RunConfig, **options: Any) -> Any:
    """The same in half a second, with steps; it notes every start and end."""
    out = Path(config.output_dir).parents[1]

    def note(what: str) -> None:
        with (out / CALLS).open("a") as file:
            file.write(f"{what} {os.getpid()} {Path(config.output_dir).parent.name}\n")

    note("start")
    for step in range(STEPS):
        time.sleep(0.05)
        options["watch"].step(step + 1, STEPS)
    result = fast(config, **options)
    note("end")
    return result


def main() -> None:
    sweep = load_sweep(sys.argv[1])
    run_sweep(sweep, Place(sys.argv[2], "shared", HEARTBEAT, GRACE), console=Console(stderr=True), train_run=slow)


if __name__ == "__main__":
    main()
