"""Does a method beat static LoRA of equal size?   python -m benchmarks.quality --tasks manual --steps 200

Three tasks, rank 2 in every map: Python's reference manual and E2E with the packaged Llama, clinc150 with MiniLM. Every
method ends with the trained parameters of static LoRA at rank 2 (``lora2x`` has twice as many). A method's learning
rate is the best of a grid whose values are a factor of two apart, by the loss on the selection part after training with
two seeds of its own (one on E2E, on clinc150 and in runs of 400 steps and more). If the best rate is at an end of the
grid, the grid is extended. Then five fresh seeds are trained at this rate. Their losses are those on the report part,
which no choice has used: other examples of the held-out part.

Every run is one line of ``OUT``, written when it is done. The same command continues where it was interrupted, and
several may share one file. ``python -m benchmarks.quality_table`` makes the tables.

All runs: AdamW, 6 % warm-up, linear decay to 0, gradient norm clipped at 1, one thread.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import math
import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

warnings.simplefilter("ignore")

import torch  # noqa: E402  # after the warnings of the libraries that it imports
from safetensors.torch import load_file, save_file  # noqa: E402
from torch import nn  # noqa: E402
from transformers import set_seed  # noqa: E402
from transformers.utils import logging as transformers_logging  # noqa: E402

import lorank  # noqa: E402
from lorank.config.sections import ModelSettings  # noqa: E402
from lorank.experiments.models import load_model, load_tokenizer  # noqa: E402
from lorank.lora import LayerPlan, NewVectors, find_layers, make_peft_model, resize_  # noqa: E402
from lorank.tasks import Task, build_task, mean_loss  # noqa: E402
from lorank.tasks.settings import (  # noqa: E402
    ClassificationSettings,
    GenerationSettings,
    LanguageModellingSettings,
    TaskSettings,
)

RANK = 2
WARMUP = 0.06
START_BATCHES = 4
"""Training batches of the gradient start."""
SELECTION_SEEDS, SEEDS = (100, 101), (0, 1, 2, 3, 4)
LONG = 400
"""Runs of at least so many steps choose among lower learning rates, and with one seed, as do those of E2E and clinc150,
which take two to three times as long as the manual's."""


@dataclass(frozen=True)
class Case:
    """A task.

    Args:
        batch: rows of a training batch.
        examples: held-out examples: the first so many for choosing learning rates, as many others for the report.
        dropout: the adapter's dropout.
        lrs: the first grid of learning rates, ascending by factors of two.
    """

    model: str
    task: TaskSettings
    batch: int
    examples: int
    lrs: tuple[float, ...]
    dropout: float = 0.0


CASES = {
    "manual": Case(
        "tiny",
        LanguageModellingSettings(data="python_reference", block_size=64),
        8,
        207,
        (5e-3, 1e-2, 2e-2, 4e-2),
    ),
    "e2e": Case(
        "tiny",
        GenerationSettings(data="e2e_nlg", max_length=160, holdout=0.3),
        8,
        400,
        (5e-3, 1e-2, 2e-2, 4e-2),
    ),
    "clinc150": Case(
        "minilm",
        ClassificationSettings(data="clinc150", max_length=32),
        16,
        1000,
        (1e-3, 2e-3, 4e-3, 8e-3),
    ),
}


@dataclass(frozen=True)
class Method:
    """A method.

    Args:
        title: its name in tables.
        allocator: makes the allocator.
        rank: the rank of the adapter when it is made.
        prepare: changes a fresh adapter before the optimiser is made: (model, batches of training data, seed).
        after: a method whose final A (with its ranks) of the same task, length and seed begins this one: with its rows
            as directions, or with the ranks alone.
        directions: see ``after``.
        batches: whether the allocator itself reads the training batches.
    """

    title: str
    allocator: Callable[[], lorank.Allocator]
    rank: int = RANK
    prepare: Callable[[nn.Module, list[Any], int], None] | None = None
    batches: bool = False
    after: str | None = None
    directions: bool = False


BUDGET = f"{100 / 2:g}% of adapter"
"""For methods that start with twice the ranks and prune them."""

METHODS: dict[str, Method] = {
    "lora": Method("LoRA", lorank.StaticLoRA),
    "lora2x": Method("LoRA, twice the parameters", lorank.StaticLoRA, 2 * RANK),
    "gradient": Method(
        "gradient start", lorank.StaticLoRA, prepare=lambda m, b, s: lorank.gradient_start_(m, b, seed=s)
    ),
    "gradient_ranks": Method(
        "gradient ranks",
        lorank.StaticLoRA,
        prepare=lambda m, b, s: lorank.initial_ranks_(m, b, budget="100% of adapter", seed=s),
    ),
    "gradient_directions": Method(
        "gradient directions",
        lorank.StaticLoRA,
        prepare=lambda m, b, s: lorank.gradient_start_(m, b, ranks="keep", seed=s),
    ),
    "wide": Method("wide start", lambda: lorank.BalancedLoRA(init="default")),
    "balanced": Method("BalancedLoRA", lorank.BalancedLoRA, batches=True),
    "balanced2": Method("BalancedLoRA, wide=2", lambda: lorank.BalancedLoRA(wide=2), batches=True),
    "balanced1": Method("BalancedLoRA, wide=1", lambda: lorank.BalancedLoRA(wide=1), batches=True),
    "final_ranks": Method("BalancedLoRA's final ranks, random A", lorank.StaticLoRA, after="balanced"),
    "final_directions": Method(
        "BalancedLoRA's final ranks and directions", lorank.StaticLoRA, after="balanced", directions=True
    ),
    "alora": Method("ALoRA", lambda: lorank.ALoRA(budget="100% of adapter")),
    "sora": Method("SoRA, from twice", lambda: lorank.SoRA(budget=BUDGET), 2 * RANK),
    "adalora": Method("AdaLoRA, from twice", lambda: lorank.AdaLoRA(budget=BUDGET), 2 * RANK),
    # a rank for each module: with one for each head, the finished adapter would have more numbers than the budget
    "ard": Method("ARD-LoRA, from twice", lambda: lorank.ARDLoRA(budget=BUDGET, heads="module", min_rank=0), 2 * RANK),
}


@dataclass(frozen=True)
class Run:
    """One run to do."""

    task: str
    method: str
    steps: int
    lr: float
    seed: int

    @property
    def key(self) -> tuple[Any, ...]:
        return (self.task, self.method, self.steps, self.lr, self.seed)

    @property
    def name(self) -> str:
        return "-".join(map(str, self.key))


@cache
def task_of(name: str) -> Task:
    settings = CASES[name].task
    return build_task(settings, load_tokenizer(ModelSettings(name=CASES[name].model)))


def begin_as_(model: nn.Module, A: Mapping[str, torch.Tensor], *, directions: bool, seed: int) -> None:
    """Gives a fresh adapter the ranks of another one, and perhaps its directions, each of the norm of PEFT's rows."""
    layers = find_layers(model)
    norm = float(torch.cat([layer.A.detach().norm(dim=1) for layer in layers.values()]).mean())
    rows = {name: nn.functional.normalize(values, dim=1) * norm for name, values in A.items()}
    plan = {
        name: LayerPlan((), len(values), vectors=NewVectors(values) if directions else None)
        for name, values in rows.items()
    }
    resize_(layers, plan, seed=seed)


def train(run: Run, adapters: Path) -> dict[str, Any]:
    """Trains one model, and returns its line of results.

    Args:
        run: the run.
        adapters: a folder for the final A of every run, which some methods begin with.
    """
    case, method, task = CASES[run.task], METHODS[run.method], task_of(run.task)
    set_seed(run.seed)
    base = load_model(ModelSettings(name=case.model), task)
    model = make_peft_model(
        base,
        task_type="CAUSAL_LM" if task.model_kind == "causal_lm" else "SEQ_CLS",
        r=method.rank,
        lora_alpha=2 * method.rank,
        lora_dropout=case.dropout,
        target_modules="all-linear",
    )
    order = order_of(len(task.train), case.batch, run.steps, run.seed)
    held_out = task.validation
    scoring = task.collator(held_out[:32])  # part of the selection examples
    first = [task.collator([task.train[i] for i in rows]) for rows in order[:START_BATCHES]]
    began = time.perf_counter()
    if method.prepare is not None:
        method.prepare(model, first, run.seed)
    if method.after is not None:
        lr = best_lr(Results(adapters.with_suffix(".jsonl")).read(), run.task, method.after, run.steps)
        before = adapters / f"{Run(run.task, method.after, run.steps, lr or 0.0, run.seed).name}.safetensors"
        begin_as_(model, load_file(before), directions=method.directions, seed=run.seed)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=run.lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: lr_factor(step, run.steps))
    ranks = lorank.attach(
        model,
        optimizer,
        method.allocator(),
        total_steps=run.steps,
        steps_per_epoch=len(task.train) / case.batch,
        validation_batch=scoring,
        seed=run.seed,
        progress=False,
        **({"train_batches": first} if method.batches else {}),
    )
    layers = find_layers(model)
    most, total = layers.parameters, 0.0
    model.train()
    for step, rows in enumerate(order):
        loss = model(**task.collator([task.train[i] for i in rows])).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.grad is not None], 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        most = max(most, layers.parameters)
        if step >= run.steps - 50:
            total += float(loss.detach()) / 50
    ranks.detach()
    adapters.mkdir(parents=True, exist_ok=True)
    save_file({name: layer.A.detach().clone() for name, layer in layers.items()}, adapters / f"{run.name}.safetensors")
    seconds = time.perf_counter() - began
    selection, report = held_out[: case.examples], held_out[case.examples : 2 * case.examples]
    line = {
        **vars(run),
        "parameters": layers.parameters,
        "most_parameters": most,
        "ranks": layers.ranks,
        "train": total,
        "selection": mean_loss(model, selection, task.collator, batch_size=32, progress=False),
        "report": mean_loss(model, report, task.collator, batch_size=32, progress=False),
        "seconds": seconds,
        "allocation_seconds": sum(record.seconds for record in ranks.history.allocations),
    }
    if task.model_kind != "causal_lm":
        line["accuracy"] = _accuracy(model, report, task)
    return line


def _accuracy(model: nn.Module, examples: Sequence[Any], task: Task) -> float:
    model.eval()
    right = 0
    with torch.no_grad():
        for start in range(0, len(examples), 64):
            batch = task.collator(examples[start : start + 64])
            right += int((model(**batch).logits.argmax(-1) == batch["labels"]).sum())
    return right / len(examples)


def order_of(examples: int, batch: int, steps: int, seed: int) -> list[list[int]]:
    """The rows of every training batch, in random order, epoch after epoch."""
    draw = torch.Generator().manual_seed(seed + 1_000_003)
    order: list[list[int]] = []
    while len(order) < steps:
        rows = torch.randperm(examples, generator=draw).tolist()
        order += [rows[start : start + batch] for start in range(0, examples - batch + 1, batch)]
    return order[:steps]


def lr_factor(step: int, steps: int) -> float:
    """The learning rate as a fraction of its peak: a linear warm-up, then linearly to 0."""
    return min((step + 1) / max(1.0, WARMUP * steps), (steps - step) / (steps * (1 - WARMUP)), 1.0)


class Results:
    """The file of results, which several processes share. A run that a process has begun is not begun by another."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._claims = path.with_suffix(".claims")
        path.parent.mkdir(parents=True, exist_ok=True)

    def read(self) -> list[dict[str, Any]]:
        if not self.path.exists():
            return []
        return [json.loads(line) for line in self.path.read_text().splitlines()]

    def claim(self, run: Run) -> bool:
        """Whether this process may do the run: it is not done, and no living process does it."""
        self._claims.mkdir(exist_ok=True)
        name = self._claims / run.name
        with (self._claims / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if run.key in {_key(line) for line in self.read()}:
                return False
            if name.exists():
                try:
                    os.kill(int(name.read_text()), 0)
                    return False
                except (ProcessLookupError, ValueError):
                    pass
            name.write_text(str(os.getpid()))
            return True

    def add(self, run: Run, line: Mapping[str, Any]) -> None:
        with self.path.open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.write(json.dumps(line) + "\n")
        (self._claims / run.name).unlink(missing_ok=True)


def _key(line: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(line[name] for name in ("task", "method", "steps", "lr", "seed"))


def first_grid(task: str, steps: int) -> tuple[float, ...]:
    """The first learning rates to try. Long runs want lower ones."""
    return tuple(lr / 2 if steps >= LONG else lr for lr in CASES[task].lrs)


def selection_seeds(task: str, steps: int) -> tuple[int, ...]:
    """The seeds for choosing learning rates."""
    return SELECTION_SEEDS if task == "manual" and steps < LONG else SELECTION_SEEDS[:1]


def grid_of(lines: Sequence[Mapping[str, Any]], task: str, method: str, steps: int) -> dict[float, float]:
    """The mean selection loss of every rate that all selection seeds have tried. A run that diverged counts as ∞."""
    seeds = selection_seeds(task, steps)
    found: dict[float, dict[int, float]] = {}
    for line in lines:
        if (line["task"], line["method"], line["steps"]) == (task, method, steps) and line["seed"] in seeds:
            loss = float(line["selection"])
            found.setdefault(line["lr"], {})[line["seed"]] = loss if math.isfinite(loss) else math.inf
    return {lr: sum(losses.values()) / len(seeds) for lr, losses in found.items() if len(losses) == len(seeds)}


def best_lr(lines: Sequence[Mapping[str, Any]], task: str, method: str, steps: int) -> float | None:
    """The learning rate with the lowest selection loss; None while the grid is not complete."""
    grid, first = grid_of(lines, task, method, steps), first_grid(task, steps)
    if not set(first) <= set(grid):
        return None
    best = min(grid, key=lambda lr: grid[lr])
    return None if best in (min(grid), max(grid)) and len(grid) < len(first) + 3 else best


def finished(lines: Sequence[Mapping[str, Any]], task: str, method: str, steps: int) -> dict[int, Mapping[str, Any]]:
    """The runs of the fresh seeds at the chosen learning rate, by seed."""
    lr = best_lr(lines, task, method, steps)
    return {
        line["seed"]: line
        for line in lines
        if (line["task"], line["method"], line["steps"], line["lr"]) == (task, method, steps, lr)
        and line["seed"] in SEEDS
    }


def wanted(lines: Sequence[Mapping[str, Any]], task: str, method: str, steps: int, seeds: int) -> Iterator[Run]:
    """The runs that are still to do, as far as they are known."""
    after = METHODS[method].after
    if after is not None and len(finished(lines, task, after, steps)) < len(SEEDS[:seeds]):
        return
    lr = best_lr(lines, task, method, steps)
    if lr is None:
        grid, rates = grid_of(lines, task, method, steps), first_grid(task, steps)
        if set(rates) <= set(grid):  # the best is at an end
            best = min(grid, key=lambda lr: grid[lr])
            rates = (best * 2 if best == max(grid) else best / 2,)
        yield from (Run(task, method, steps, lr, seed) for seed in selection_seeds(task, steps) for lr in rates)
        return
    for seed in SEEDS[:seeds]:
        yield Run(task, method, steps, lr, seed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", default=",".join(CASES), help="comma-separated")
    parser.add_argument("--methods", default=",".join(METHODS), help="comma-separated, in the order to run them")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=len(SEEDS), help="fresh seeds of every method")
    parser.add_argument("--lr", type=float, help="this learning rate alone, for a first look")
    parser.add_argument("--out", type=Path, default=Path("runs/quality.jsonl"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    transformers_logging.set_verbosity_error()
    results = Results(given.out)
    tasks, methods = given.tasks.split(","), given.methods.split(",")
    while True:
        lines = results.read()
        if given.lr is None:
            todo = (run for t in tasks for m in methods for run in wanted(lines, t, m, given.steps, given.seeds))
        else:
            todo = (Run(t, m, given.steps, given.lr, s) for t in tasks for m in methods for s in SEEDS[: given.seeds])
        run = next((run for run in todo if results.claim(run)), None)
        if run is None:
            return
        line = train(run, given.out.with_suffix(".adapters"))
        results.add(run, line)
        print(
            f"{run.task} {run.method} {run.steps} lr {run.lr:g} seed {run.seed}: selection {line['selection']:.4f} "
            f"report {line['report']:.4f}, {line['parameters']:,} parameters, {line['seconds']:.1f} s",
            flush=True,
        )


if __name__ == "__main__":
    main()
