"""Does a task need capacity?   python -m benchmarks.capacity facts_lora task.subset=1024 --out capacity.jsonl

Trains LoRA of rank 1, 2, 4, 8 and 16 in every linear map, and all weights, on the task of a recipe, and prints their
validation losses. A comparison of rank budgets makes sense only on a task that separates these. The learning rate of
each is the best of a grid of factors of two, which grows until the best has a worse neighbour on both sides. One seed,
100; alpha is twice the rank. Only validation data are read, and the weights after the last step are measured.

Every run is one line of OUT. The same command continues where it was interrupted.
"""

import argparse
import json
import math
import tempfile
import time
import warnings
from functools import cache
from pathlib import Path
from typing import Any

warnings.simplefilter("ignore")

from transformers import set_seed  # noqa: E402  # after the warnings of the libraries that it imports
from transformers.utils.logging import disable_progress_bar  # noqa: E402

import lorank  # noqa: E402
from lorank.config import load_config  # noqa: E402
from lorank.experiments.adapted_model import adapted_model  # noqa: E402
from lorank.experiments.models import load_model, load_tokenizer  # noqa: E402
from lorank.experiments.run import make_trainer, training_arguments  # noqa: E402
from lorank.tasks import Task, build_task, mean_loss  # noqa: E402

RANKS: tuple[int | str, ...] = (1, 2, 4, 8, 16, "full")
SEED = 100
FIRST = {"LoRA": 1e-2, "full": 1e-3}
"""The learning rates that are tried first."""


@cache
def task_of(recipe: str, changes: tuple[str, ...]) -> Task:
    config = load_config(recipe, changes)
    return build_task(config.task, load_tokenizer(config.model))


def train(recipe: str, changes: tuple[str, ...], rank: int | str, lr: float) -> dict[str, Any]:
    """Trains one model. Returns its line of results."""
    task = task_of(recipe, changes)
    method = "full" if rank == "full" else "static"
    size = [] if rank == "full" else [f"lora.r={rank}", f"lora.alpha={2 * int(rank)}"]
    with tempfile.TemporaryDirectory() as folder:
        run = [*size, f"training.lr={lr}", f"training.seed={SEED}", f"output_dir={folder}"]
        config = load_config(recipe, [*changes, f"allocator={{name: {method}}}", *run])
        set_seed(SEED)
        model = adapted_model(config, task)
        parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
        callbacks = [] if rank == "full" else [lorank.RankCallback(lorank.StaticLoRA(), progress=False)]
        arguments = training_arguments(config, len(task.train), checkpoints=False)
        trainer = make_trainer(config, arguments, task, model, callbacks)
        began, cpu = time.perf_counter(), time.process_time()
        trainer.train()
        seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    loss = mean_loss(model, task.validation, task.collator, batch_size=64, progress=False)
    return {
        "recipe": recipe,
        "changes": changes,
        "rank": rank,
        "lr": lr,
        "parameters": parameters,
        "steps": trainer.state.global_step,
        "validation": loss if math.isfinite(loss) else None,
        "seconds": seconds,
        "cpu_seconds": cpu,
    }


def next_rate(losses: dict[float, float], first: float) -> float | None:
    """The next learning rate to try; None: the best has a worse neighbour on both sides."""
    if not losses:
        return first
    best = min(losses, key=lambda lr: (losses[lr], lr))
    return next((lr for lr in (best * 2, best / 2) if lr not in losses), None)


def row(lines: list[dict[str, Any]]) -> str:
    """The row of the table for the runs of one rank: the best of them, and the losses at all rates."""
    losses = losses_of(lines)
    best = min(lines, key=lambda line: (losses[line["lr"]], line["lr"]))
    tried = ", ".join(f"{lr:g}: {losses[lr]:.3f}" for lr in sorted(losses))
    found = f"{best['parameters']:,} | {best['lr']:g} | {losses[best['lr']]:.4f} | {best['cpu_seconds']:.0f}"
    return f"| {best['rank']} | {found} | {tried} |"


def losses_of(lines: list[dict[str, Any]]) -> dict[float, float]:
    """Validation loss by learning rate; infinite where a run diverged."""
    return {line["lr"]: math.inf if line["validation"] is None else line["validation"] for line in lines}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("recipe")
    parser.add_argument("changes", nargs="*", help="KEY=VALUE, as for lorank train")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    disable_progress_bar()
    changes = tuple(given.changes)
    lines = [json.loads(line) for line in given.out.read_text().splitlines()] if given.out.exists() else []
    lines = [line for line in lines if (line["recipe"], tuple(line["changes"])) == (given.recipe, changes)]
    task = task_of(given.recipe, changes)
    base = load_model(load_config(given.recipe, changes).model, task)
    before = mean_loss(base, task.validation, task.collator, batch_size=64, progress=False)
    print(f"before training: {before:.4f}")
    print("| rank | parameters | best rate | validation loss | seconds of one core | all rates |\n" + "|---" * 6 + "|")
    for rank in RANKS:
        mine = [line for line in lines if line["rank"] == rank]
        while (lr := next_rate(losses_of(mine), FIRST["full" if rank == "full" else "LoRA"])) is not None:
            mine.append(train(given.recipe, changes, rank, lr))
            with given.out.open("a") as file:
                file.write(json.dumps(mine[-1]) + "\n")
        print(row(mine), flush=True)


if __name__ == "__main__":
    main()
