"""A run that is killed again and again ends as one that never was: weights, optimiser, ranks, history, to the last bit.

    python -m tests.kills --count 100

One process imports everything and forks a child for each attempt: `lorank train` of a few steps, in which ranks move
and checkpoints are written. SIGKILL comes at a random moment of the child, from before its folder exists until after
its result is written; the next child resumes, and may be killed again. When a run has come to its end, it is compared
with one that was never disturbed, and the next run begins, until there were ``--count`` kills.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoTokenizer

from lorank.config.settings import RunConfig, make_config
from lorank.experiments import folder, train
from lorank.experiments.models import resolve
from lorank.training.checkpoint.integrity import checkpoints, step_of
from lorank.training.history import read_history
from tests.models import tiny_llama

STEPS = 8
METHODS: dict[str, dict[str, Any]] = {
    "alora": {"k1": 2, "k2": 2, "rounds": 3, "unit": "steps", "per_round": 2},
    "sora": {"prune_every": 2},
    "ard": {"heads": "module", "alpha_lr": 0.05, "l1": 0.05, "resize_every": 2, "hold": 1},
    "adalora": {"t_init": 1, "t_final": 2, "delta_t": 2},
}


@dataclass
class Tally:
    """What came of the kills."""

    kills: int = 0
    runs: int = 0
    different: list[str] = field(default_factory=list)
    moments: Counter[str] = field(default_factory=Counter)


def configuration(place: Path, method: str, out: Path) -> RunConfig:
    """Eight steps, a checkpoint and an evaluation after every second one, with dropout."""
    return make_config(
        {
            "model": {"name": str(place / "model")},
            "lora": {"r": 4, "alpha": 8, "dropout": 0.1, "target_modules": ["q_proj", "v_proj"]},
            "task": {"name": "classification", "data": str(place / "data")},
            "allocator": {"name": method, **METHODS[method]},
            "allocator_samples": 4,
            "training": {"epochs": 1, "max_steps": STEPS, "batch_size": 4, "lr": 3e-3, "eval_steps": 2},
            "output_dir": str(out),
        }
    )


def prepare(place: Path) -> None:
    """A tiny model and a data set."""
    tiny_llama(vocab_size=4096, max_position_embeddings=256, pad_token_id=2, eos_token_id=1).save_pretrained(
        place / "model"
    )
    AutoTokenizer.from_pretrained(resolve("tiny")).save_pretrained(place / "model")
    (place / "data").mkdir()
    draw = random.Random(0)
    for split, count in {"train": 40, "validation": 8, "test": 8}.items():
        rows = [
            {"text": f"a very {(word := draw.choice(['good', 'bad']))} film", "label": int(word == "good")}
            for _ in range(count)
        ]
        (place / "data" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def attempt(config: RunConfig, log: Path, kill_after: float | None) -> bool:
    """One child; True if it came to its end. ``kill_after`` seconds it is killed."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            with log.open("a") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
                began = (Path(config.output_dir) / folder.CONFIG).is_file()
                train(config, resume=began, console=Console(file=file))
            code = 0
        except BaseException:
            import traceback

            traceback.print_exc()
            sys.stderr.flush()
        finally:
            os._exit(code)
    began = time.monotonic()
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            if status:
                raise RuntimeError(f"a run ended with an error, see {log}:\n{log.read_text()[-3000:]}")
            return True
        if kill_after is not None and time.monotonic() - began >= kill_after:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return False
        time.sleep(0.001)


def moment(out: Path) -> str:
    """How far a killed run had come, by what lies in its folder."""
    if not (out / folder.CONFIG).is_file():
        return "before its configuration was written"
    if (out / folder.METRICS).is_file():
        return "after its result was written"
    if (out / folder.ADAPTER).is_dir():
        return "between the adapter and the figures"
    steps = [step_of(path) for path in checkpoints(out)]
    return f"with checkpoint {max(steps)} begun" if steps else "before the first checkpoint"


def result(out: Path) -> dict[str, Any]:
    """All that must be equal: no time of day, no duration."""
    last = max(checkpoints(out), key=step_of)
    history = [
        (
            record.step,
            record.method,
            record.ranks,
            record.pruned,
            record.added,
            record.scores,
            record.active,
            {key: value for key, value in record.details.items() if "seconds" not in key},
        )
        for record in read_history(out / folder.HISTORY)
    ]
    metrics = json.loads((out / folder.METRICS).read_text())
    return {
        "adapter": load_file(out / folder.ADAPTER / "adapter_model.safetensors"),
        "adapter_config": json.loads((out / folder.ADAPTER / "adapter_config.json").read_text()),
        "last": load_file(last / "adapter_model.safetensors"),
        "optimizer": torch.load(last / "optimizer.pt", weights_only=True),
        "scheduler": torch.load(last / "scheduler.pt", weights_only=True),
        "rng": torch.load(last / "rng_state.pth", weights_only=False)["cpu"],
        "history": history,
        "ranks": history[-1][2],
        "validation": metrics["validation"]["loss_after"],
        "test": metrics["test"],
        "step": step_of(last),
    }


def difference(first: Any, second: Any, where: str = "") -> str | None:
    """Where two results differ, to the last bit, or None."""
    if isinstance(first, torch.Tensor):
        same = isinstance(second, torch.Tensor) and first.dtype == second.dtype and torch.equal(first, second)
        return None if same else where
    if isinstance(first, dict):
        if not isinstance(second, dict) or first.keys() != second.keys():
            return where
        return next((found for key in first if (found := difference(first[key], second[key], f"{where}/{key}"))), None)
    if isinstance(first, list | tuple):
        if not isinstance(second, list | tuple) or len(first) != len(second):
            return where
        pairs = enumerate(zip(first, second, strict=True))
        return next((found for i, (a, b) in pairs if (found := difference(a, b, f"{where}/{i}"))), None)
    return None if first == second else where


def kill(count: int, place: Path, *, seed: int = 0, methods: tuple[str, ...] = tuple(METHODS)) -> Tally:
    """Kills ``count`` times in ``place``, method after method, and compares every run that came to its end."""
    torch.set_num_threads(1)
    prepare(place)
    draw, tally, log = random.Random(seed), Tally(), place / "log.txt"
    straight: dict[str, dict[str, Any]] = {}
    durations: dict[str, float] = {}
    while tally.kills < count:
        method = methods[tally.runs % len(methods)]
        if method not in straight:
            out, began = place / f"straight-{method}", time.monotonic()
            attempt(configuration(place, method, out), log, None)
            durations[method] = time.monotonic() - began
            straight[method] = result(out)
            assert len({json.dumps(entry[2]) for entry in straight[method]["history"]}) > 1, "no rank moved"
        out = place / "killed"
        shutil.rmtree(out, ignore_errors=True)
        config = configuration(place, method, out)
        again = True
        while again and tally.kills < count:
            if not attempt(config, log, draw.uniform(0.0, durations[method])):
                tally.kills += 1
                tally.moments[moment(out)] += 1
            again = draw.random() < 0.67 and not (out / folder.METRICS).is_file()
        if not (out / folder.METRICS).is_file():
            attempt(config, log, None)
        where = difference(straight[method], result(out))
        tally.runs += 1
        if where is not None:
            tally.different.append(f"{method}: {where}")
            print(f"DIFFERENT {method} at {where}", flush=True)
    return tally


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    arguments = parser.parse_args()
    began = time.monotonic()
    with TemporaryDirectory() as place:
        tally = kill(arguments.count, Path(place), seed=arguments.seed, methods=tuple(arguments.methods))
    print(
        f"{tally.kills} kills, {tally.runs} runs, {len(tally.different)} different, "
        f"{(time.monotonic() - began) / 60:.1f} minutes, seed {arguments.seed}"
    )
    for when, times in sorted(tally.moments.items()):
        print(f"  {times:3d} killed {when}")
    sys.exit(bool(tally.different))


if __name__ == "__main__":
    main()
