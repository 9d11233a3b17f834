"""How far scores of ranks are from the truth, and their cost:  python -m benchmarks.scores --out runs/scores

Three tasks: clinc150 with MiniLM (a classifier), E2E and Python's reference manual with the packaged tiny Llama (causal
language models; labels on the answers, or on all tokens). Each model is trained by ALoRA with eight rounds. One step
before the first, the fourth and the last round, the ranks are scored by all scoring methods. The truth is exact AB-LoRA
on 512 samples that no other method uses. The truth takes most of the time, so adapters have rank 4 on some of the maps;
--full uses the paper's rank 8 on all of them (many hours). Methods on 32 samples are measured on two disjoint draws and
averaged; second-order methods on one draw.

For each method: Spearman's correlation with the truth over all ranks; the share of the truly lowest ranks that it would
prune in a round; its time, divided by the time of plain forward passes for the paper's exact scores on 32 samples. The
time of exact scores is proportional to the number of ranks; the time of estimates is not. So the last table gives the
time for rank 8 on all linear maps, with random adapters, because values do not change times.

Each state is written to OUT/STATE.json when it is done. If the file already exists, it is read instead.
"""

from __future__ import annotations

import argparse
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

warnings.simplefilter("ignore")

import torch  # noqa: E402  # after the warnings of the libraries that it imports
from scipy.stats import spearmanr  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from transformers import set_seed  # noqa: E402
from transformers.utils import logging as transformers_logging  # noqa: E402

import lorank  # noqa: E402
from benchmarks import estimates  # noqa: E402
from benchmarks.estimates import Batch, Estimate  # noqa: E402
from lorank.config.sections import ModelSettings  # noqa: E402
from lorank.experiments.models import load_model, load_tokenizer  # noqa: E402
from lorank.files import write_text  # noqa: E402
from lorank.lora import AdapterLayers, find_layers, make_peft_model  # noqa: E402
from lorank.tasks import Task, build_task  # noqa: E402
from lorank.tasks.settings import (  # noqa: E402
    ClassificationSettings,
    GenerationSettings,
    LanguageModellingSettings,
    TaskSettings,
)

ROUNDS = 8
MOMENTS = {"early": 1, "middle": 4, "late": ROUNDS}
"""The round after each moment."""


@dataclass(frozen=True)
class Case:
    """A model and its training.

    Attributes:
        model: name of the base model.
        task: settings of the task.
        lr: learning rate.
        batch: examples per step.
        rank: rank of every adapted map.
        k: K1 = 2 · k steps, K2 = k steps.
        targets: the adapted maps.
    """

    model: str
    task: TaskSettings
    lr: float
    batch: int
    rank: int = 4
    k: int = 40
    targets: str | list[str] = "all-linear"


LLAMA = ["q_proj", "v_proj", "up_proj", "down_proj"]
CASES = {
    "clinc150": Case(
        "minilm",
        ClassificationSettings(data="clinc150", max_length=32, max_train=6000),
        2e-3,
        32,
        targets=["query", "value", "intermediate.dense"],
    ),
    "e2e_nlg": Case(
        "tiny",
        GenerationSettings(data="e2e_nlg", max_length=64, holdout=0.4),
        5e-3,
        16,
        targets=["q_proj", "v_proj", "down_proj"],
    ),
    "python_reference": Case(
        "tiny",
        LanguageModellingSettings(data="python_reference", block_size=32, holdout=0.4),
        5e-3,
        16,
        targets=LLAMA,
    ),
}
_SHORT = LanguageModellingSettings(data="python_reference", block_size=16, holdout=0.4)
TOY = Case("tiny", _SHORT, 5e-3, 4, rank=2, k=1, targets=["v_proj"])


@dataclass(frozen=True)
class Samples:
    """Numbers of samples and draws.

    Attributes:
        paper: samples of the paper's batch.
        more: samples of the larger batches.
        truth: samples of the truth.
        draws: draws of random signs in second-order methods.
    """

    paper: int = 32
    more: tuple[int, ...] = (128, 512)
    truth: int = 512
    draws: tuple[int, ...] = (4, 16)


def adapted(case: Case) -> tuple[nn.Module, Task]:
    """The model with its new adapter, and the task."""
    set_seed(0)
    settings = ModelSettings(name=case.model)
    task = build_task(case.task, load_tokenizer(settings))
    kind = "CAUSAL_LM" if task.model_kind == "causal_lm" else "SEQ_CLS"
    rank = {"r": case.rank, "lora_alpha": 2 * case.rank, "target_modules": case.targets}
    return make_peft_model(load_model(settings, task), task_type=kind, **rank).train(), task


def states(case: Case, moments: Sequence[str]) -> Iterator[tuple[str, nn.Module, AdapterLayers, Task]]:
    """Trains the model and yields its state at each moment."""
    model, task = adapted(case)
    first, every = 2 * case.k, case.k
    total = first + every * ROUNDS
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=case.lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / total)
    allocator = lorank.ALoRA(k1=first, k2=every, unit="steps", rounds=ROUNDS)
    ranks = lorank.attach(
        model,
        optimizer,
        allocator,
        total_steps=total,
        validation_batch=task.collator(task.validation[: allocator.validation_samples]),
        progress=False,
    )
    stops = {first + every * (MOMENTS[moment] - 1) - 1: moment for moment in moments}
    generator = torch.Generator().manual_seed(0)
    while ranks.step < max(stops):
        rows = torch.randint(0, len(task.train), (case.batch,), generator=generator).tolist()
        model(**task.collator([task.train[row] for row in rows])).loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if ranks.step in stops:
            yield stops[ranks.step], model, find_layers(model), task


def measured(model: nn.Module, layers: AdapterLayers, task: Task, samples: Samples) -> dict[str, Any]:
    """The agreement with the truth and the cost of every scoring method, for one state."""
    most = max(samples.more)

    def rows(start: int, count: int) -> Batch:
        if start + count > len(task.validation):
            raise SystemExit(f"{len(task.validation)} validation samples are fewer than {start + count}")
        return task.collator(task.validation[start : start + count])

    rows(most, samples.truth)
    draws = [rows(start, samples.paper) for start in (0, samples.paper)]
    plain = estimates.plain_seconds(model, layers, draws[0])
    truth = estimates.truth(model, layers, task, task.validation[most : most + samples.truth])
    count = len(layers)  # n_A
    exact = [estimates.exact(model, layers, draw) for draw in draws]
    screened = [estimates.screen(model, layers, draw, count) for draw in draws]

    def both(way: Callable[[Batch], Estimate]) -> list[Estimate]:
        return [way(draw) for draw in draws]

    ways: dict[str, list[Estimate]] = {f"exact on {samples.paper}": exact}
    ways[f"first order on {samples.paper}"] = both(lambda draw: estimates.first_order(model, layers, draw))
    for number in samples.more:
        ways[f"first order on {number}"] = [estimates.first_order(model, layers, rows(0, number))]
    for number in samples.draws:
        one = estimates.second_order(model, layers, draws[0], number)
        ways[f"second order, {number} draws, on {samples.paper}"] = [one]
    many = rows(0, samples.more[0])
    ways[f"alone exact on {samples.paper}, without on {samples.more[0]}"] = both(
        lambda draw: estimates.alone_exact(model, layers, draw, many)
    )
    ways[f"screen on {samples.paper}"] = screened
    return {
        "ranks": layers.total_rank,
        "modules": count,
        "plain_seconds": plain,
        "ways": {name: _compared(found, truth, count, plain) for name, found in ways.items()},
        "screen": {
            "alike": [_alike(a.scores, b.scores, count) for a, b in zip(screened, exact, strict=True)],
            "evaluated": [a.evaluations / b.evaluations for a, b in zip(screened, exact, strict=True)],
            "time": [a.seconds / b.seconds for a, b in zip(screened, exact, strict=True)],
        },
    }


def costs(case: Case, samples: Samples) -> dict[str, float]:
    """The time of estimates divided by the time of plain passes for the paper's scores, with a random adapter."""
    model, task = adapted(case)
    layers = find_layers(model)
    with torch.no_grad():
        for layer in layers.values():
            layer.B.normal_(std=0.01)
    batches = {count: task.collator(task.validation[:count]) for count in (samples.paper, *samples.more)}
    plain = estimates.plain_seconds(model, layers, batches[samples.paper])
    found = {
        f"first order on {count}": estimates.first_order(model, layers, batch).seconds / plain
        for count, batch in batches.items()
    }
    return {"ranks": layers.total_rank, **found}


def _lowest(scores: Tensor, count: int) -> set[int]:
    return set(torch.sort(scores, stable=True).indices[:count].tolist())


def _alike(one: Tensor, other: Tensor, count: int) -> float:
    """The share of the lowest ranks that two scores have in common."""
    return len(_lowest(one, count) & _lowest(other, count)) / count


def _compared(found: Sequence[Estimate], truth: Tensor, count: int, plain: float) -> dict[str, float]:
    each = [
        (float(spearmanr(one.scores, truth).statistic), _alike(one.scores, truth, count), one.seconds / plain)
        for one in found
    ]
    spearman, lowest, cost = (sum(values) / len(each) for values in zip(*each, strict=True))
    return {"spearman": spearman, "lowest": lowest, "cost": cost}


def tables(found: Mapping[str, Mapping[str, Any]], wide: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Markdown tables: one per measure of the scoring methods, one for the screen, one for costs at full rank."""
    names = list(found)
    lines = []
    for title, key, form in (
        ("Spearman's correlation with the truth", "spearman", "{:.3f}"),
        ("Share of the truly lowest ranks that are found", "lowest", "{:.0%}"),
        ("Time, divided by plain forward passes for the paper's scores", "cost", "{:.3f}"),
    ):
        lines += [f"\n{title}\n", f"| | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
        for way in next(iter(found.values()))["ways"]:
            cells = [form.format(found[name]["ways"][way][key]) for name in names]
            lines.append(f"| {way} | {' | '.join(cells)} |")
    lines += ["\nScreen, compared with exact scores on the same samples\n", f"| | {' | '.join(names)} |"]
    lines.append("|---" * (len(names) + 1) + "|")
    for key in ("alike", "evaluated", "time"):
        cells = [" ".join(f"{value:.2f}" for value in found[name]["screen"][key]) for name in names]
        lines.append(f"| {key} | {' | '.join(cells)} |")
    lines += ["\nTime at rank 8 on all linear maps, divided by plain forward passes for the paper's scores\n"]
    lines += [f"| | {' | '.join(wide)} |", "|---" * (len(wide) + 1) + "|"]
    for key in next(iter(wide.values())):
        cells = [f"{one[key]:.0f}" if key == "ranks" else f"1/{1 / one[key]:.0f}" for one in wide.values()]
        lines.append(f"| {key} | {' | '.join(cells)} |")
    return lines


def main(arguments: Sequence[str] | None = None) -> dict[str, dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, required=True, help="a folder; finished states in it are not measured again"
    )
    parser.add_argument("--tasks", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--full", action="store_true", help="rank 8 on all linear maps: many hours")
    parser.add_argument(
        "--toy", action="store_true", help="a few samples of one task, to check that the benchmark runs"
    )
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    logging.getLogger("lorank").setLevel(logging.WARNING)
    transformers_logging.set_verbosity_error()
    chosen = {"toy": TOY} if options.toy else {name: CASES[name] for name in options.tasks}
    full = {name: replace(case, rank=8, targets="all-linear") for name, case in chosen.items()}
    cases = full if options.full else chosen
    samples = Samples(2, (4, 8), 4, (1,)) if options.toy else Samples()
    options.out.mkdir(parents=True, exist_ok=True)
    found: dict[str, dict[str, Any]] = {}
    wide: dict[str, dict[str, float]] = {}
    for name, case in cases.items():
        file = options.out / f"{name}_costs.json"
        if not file.exists():
            write_text(file, json.dumps(costs(full[name], samples), indent=2))
        wide[name] = json.loads(file.read_text())
        moments = ["early"] if options.toy else list(MOMENTS)
        files = {moment: options.out / f"{name}_{moment}.json" for moment in moments}
        if missing := [moment for moment, file in files.items() if not file.exists()]:
            for moment, model, layers, task in states(case, missing):
                write_text(files[moment], json.dumps(measured(model, layers, task, samples), indent=2))
        found |= {f"{name}, {moment}": json.loads(file.read_text()) for moment, file in files.items()}
    print("\n".join(tables(found, wide)), flush=True)
    return found


if __name__ == "__main__":
    main()
