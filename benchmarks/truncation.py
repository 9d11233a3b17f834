"""Cutting a trained adapter without training, and what its rank curve predicts:  python -m benchmarks.truncation

Two tasks of ``benchmarks.quality``: Python's reference manual and E2E, with the packaged Llama. A LoRA of rank 8 on all
linear maps is trained by plain PEFT (200 steps, AdamW, learning rate 1e-2, alpha = 2r) and then cut to 50, 25 and
12.5 % of its parameters by several ways. Every way has the same budget in parameters. Ways that need data read the same
64 held-out rows (exact ablation the first 32); the losses are those on 384 other rows. The only choice that was made by
these losses is the default number of stages.

The second table has the rank curve of a LoRA of rank 16: the predicted loss for several budgets, the loss after such a
cut, and the loss of a LoRA of that size that was trained from the start. All runs of the second table have the same
seed, steps and learning rate.

Every adapter and every result is written to OUT when it is done. The same command continues where it was interrupted.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

warnings.simplefilter("ignore")

import torch  # noqa: E402  # after the warnings of the libraries that it imports
from torch import Tensor, nn  # noqa: E402
from transformers import set_seed  # noqa: E402
from transformers.utils import logging as transformers_logging  # noqa: E402

import lorank  # noqa: E402
from benchmarks.quality import CASES, lr_factor, order_of, task_of  # noqa: E402
from lorank.allocators import Budget, ResolvedBudget, truncate_  # noqa: E402
from lorank.config.sections import ModelSettings  # noqa: E402
from lorank.experiments.models import load_model  # noqa: E402
from lorank.lora import AdapterLayers, LayerPlan, find_layers, load_adapter, make_peft_model, resize_, save_adapter  # noqa: E402
from lorank.report import Line, curve_picture  # noqa: E402
from lorank.scoring import ablation_scores, first_order_scores, saliency_scores  # noqa: E402
from lorank.tasks import mean_loss  # noqa: E402

TASKS = ("manual", "e2e")
TITLES = {"manual": "Python's manual", "e2e": "E2E"}
STEPS, LR, RANK, WIDE = 200, 1e-2, 8, 16
SHARES = (50.0, 25.0, 12.5)
SCORING, EXACT, REPORT = 64, 32, 384
"""Held-out rows: for scores, for exact ablation, and for the losses (others)."""
ROWS = 8
"""Rows per batch of Gramians and gradients."""
TRAINED = (1, 2, 4, 8, 16)

Scores = dict[str, Tensor]


def adapter_of(out: Path, task: str, rank: int, steps: int | None = None, seed: int = 0) -> Path:
    """The folder of a trained LoRA; it is trained if it is not there."""
    steps = STEPS if steps is None else steps
    folder = out / f"{task}-rank{rank}-{steps}steps-seed{seed}"
    if (folder / "adapter_config.json").is_file():
        return folder
    case, data = CASES[task], task_of(task)
    set_seed(seed)
    model = make_peft_model(
        load_model(ModelSettings(name=case.model), data),
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=2 * rank,
        target_modules="all-linear",
    )
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LR, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: lr_factor(step, steps))
    model.train()
    for rows in order_of(len(data.train), case.batch, steps, seed):
        model(**data.collator([data.train[i] for i in rows])).loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.grad is not None], 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return save_adapter(find_layers(model), folder)


def opened(task: str, folder: Path) -> tuple[nn.Module, AdapterLayers]:
    model = load_adapter(load_model(ModelSettings(name=CASES[task].model), task_of(task)), folder)
    return model, find_layers(model)


def batches_of(task: str) -> list[Mapping[str, Any]]:
    data = task_of(task)
    return [data.collator(data.validation[i : min(i + ROWS, SCORING)]) for i in range(0, SCORING, ROWS)]


def loss_of(task: str, model: nn.Module) -> float:
    data = task_of(task)
    return mean_loss(model, data.validation[128 : 128 + REPORT], data.collator, batch_size=32, progress=False)


# Scores of ranks in the basis in which they were trained.


def magnitude(model: nn.Module, layers: AdapterLayers, task: str) -> Scores:
    """s · ‖row of A‖ · ‖column of B‖, the Frobenius norm of the rank's update."""
    return {
        name: abs(one.scaling) * one.A.detach().norm(dim=1) * one.B.detach().norm(dim=0) for name, one in layers.items()
    }


def sensitivity(model: nn.Module, layers: AdapterLayers, task: str) -> Scores:
    """AdaLoRA's importance |w · ∂L/∂w|, averaged over batches, and summed as means over the row and the column."""
    totals = {name: torch.zeros(one.rank) for name, one in layers.items()}
    for one in layers.values():
        one.A.requires_grad_(True)
        one.B.requires_grad_(True)
    for batch in batches_of(task):
        model(**batch).loss.backward()
        for name, one in layers.items():
            totals[name] += (one.A * one.A.grad).abs().mean(1).detach() + (one.B * one.B.grad).abs().mean(0).detach()
        model.zero_grad(set_to_none=True)
    return totals


def saliency(model: nn.Module, layers: AdapterLayers, task: str) -> Scores:
    return saliency_scores(model, layers, batches_of(task))


def first_order(terms: str) -> Callable[[nn.Module, AdapterLayers, str], Scores]:
    def scores(model: nn.Module, layers: AdapterLayers, task: str) -> Scores:
        data = task_of(task)
        return first_order_scores(model, layers, data.collator(data.validation[:SCORING]), terms=terms).scores

    return scores


def exact(terms: str) -> Callable[[nn.Module, AdapterLayers, str], Scores]:
    def scores(model: nn.Module, layers: AdapterLayers, task: str) -> Scores:
        data = task_of(task)
        return ablation_scores(model, layers, data.collator(data.validation[:EXACT]), terms=terms).scores

    return scores


FIXED: dict[str, tuple[str, Callable[[nn.Module, AdapterLayers, str], Scores]]] = {
    "magnitude": ("‖A‖ · ‖B‖", magnitude),
    "sensitivity": ("sensitivity", sensitivity),
    "saliency": ("saliency", saliency),
    "first_order": ("first order, both terms", first_order("both")),
    "first_order_without": ("first order, `without`", first_order("without")),
    "exact": ("exact ablation on 32, both terms", exact("both")),
    "exact_without": ("exact ablation on 32, `without`", exact("without")),
}
BALANCED: dict[str, tuple[str, int, tuple[float, ...]]] = {
    "balanced1": ("balanced, at the adapter, 1 stage", 1, (1.0,)),
    "balanced2": ("balanced, at the adapter, 2 stages", 2, (1.0,)),
    "balanced4": ("balanced, at the adapter, 4 stages", 4, (1.0,)),
    "balanced8": ("balanced, at the adapter, 8 stages", 8, (1.0,)),
    "path1": ("balanced, at 1 and ½, 1 stage", 1, (1.0, 0.5)),
    "path2": ("balanced, at 1 and ½, 2 stages", 2, (1.0, 0.5)),
    "path4": ("balanced, at 1 and ½, 4 stages", 4, (1.0, 0.5)),
    "quarter1": ("balanced, at ¼, 1 stage", 1, (0.25,)),
}
"""Title, number of stages, and factors of the update at which Gramians are measured."""
DEFAULT = "path2"


def cut_fixed(layers: AdapterLayers, scores: Scores, budget: ResolvedBudget) -> None:
    kept = budget.keep_best(budget.per_cost(scores))
    resize_(layers, {name: LayerPlan(some) for name, some in kept.items()})


class Results:
    """Values by key in a JSON file; a value is computed once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.values: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}

    def get(self, key: str, compute: Callable[[], Any]) -> Any:
        if key not in self.values:
            began = time.perf_counter()
            self.values[key] = compute()
            self.path.write_text(json.dumps(self.values, indent=1) + "\n")
            print(
                f"{key}: {self.values[key] if not isinstance(self.values[key], dict) else '…'} "
                f"({time.perf_counter() - began:.0f} s)",
                flush=True,
            )
        return self.values[key]


def cuts(results: Results, out: Path, task: str, seed: int, ways: Sequence[str]) -> None:
    """The loss after each cut."""
    folder = adapter_of(out, task, RANK, seed=seed)
    where = f"{task} seed {seed}"
    results.get(f"{where} | whole", lambda: loss_of(task, opened(task, folder)[0]))
    for way in ways:
        scores: Scores = {}
        for share in SHARES:

            def compute(way: str = way, share: float = share, scores: Scores = scores) -> float:
                model, layers = opened(task, folder)
                budget = Budget.parse(f"{share}% of adapter").resolve(layers)
                if way in FIXED:
                    if not scores:
                        scores.update(FIXED[way][1](model, layers, task))
                    cut_fixed(layers, scores, budget)
                elif way == "svd":
                    lorank.resize_adapter_(model, budget=f"{share}% of adapter")
                else:
                    _, stages, path = BALANCED[way]
                    truncate_(model, layers, batches_of(task), budget, stages=stages, path=path)
                assert budget.fits(layers.ranks)
                return loss_of(task, model)

            results.get(f"{where} | {way} | {share:g}", compute)


def curves(results: Results, out: Path, task: str, seed: int) -> None:
    """The rank curve of a rank-16 run and of a short one, the losses after cuts, and those of trained adapters."""
    where = f"{task} seed {seed}"
    for rank in TRAINED:
        results.get(
            f"{where} | trained | {rank}",
            lambda rank=rank: loss_of(task, opened(task, adapter_of(out, task, rank, seed=seed))[0]),
        )
    for steps in (STEPS, STEPS // 4):
        folder = adapter_of(out, task, WIDE, steps, seed)

        def predicted(folder: Path = folder) -> dict[str, Any]:
            model, _ = opened(task, folder)
            curve = lorank.rank_curve(model, batches_of(task))
            return {**curve.to_dict(), "at": {str(n): curve.at(f"{100 * n / WIDE}%").loss for n in TRAINED}}

        results.get(f"{where} | curve of {steps} steps", predicted)
    folder = adapter_of(out, task, WIDE, STEPS, seed)
    for rank in TRAINED[:-1]:

        def cut(rank: int = rank) -> float:
            model, layers = opened(task, folder)
            budget = Budget.parse(f"{100 * rank / WIDE}% of adapter").resolve(layers)
            truncate_(model, layers, batches_of(task), budget)
            return loss_of(task, model)

        results.get(f"{where} | cut | {rank}", cut)


def picture(results: Mapping[str, Any], task: str, seed: int, path: Path) -> Path:
    """Predicted, cut and trained losses of one task, on the report rows.

    The prediction is the loss of the whole adapter on these rows, and the increase that other rows predict.
    """
    where = f"{task} seed {seed}"
    curve, whole = results[f"{where} | curve of {STEPS} steps"], results[f"{where} | trained | {WIDE}"]
    size = curve["parameters"]
    shift = whole - curve["loss"]
    points = [
        (point["parameters"], point["loss"] + shift) for point in curve["points"] if point["share"] >= 0.98 / WIDE
    ]
    lines = [Line(f"predicted from the rank-{WIDE} run", points)]
    for way, label in (("cut", "that adapter, cut without training"), ("trained", "a LoRA of this size, trained")):
        found = [
            (size * n // WIDE, results[f"{where} | {way} | {n}"])
            for n in TRAINED
            if f"{where} | {way} | {n}" in results
        ]
        lines.append(Line(label, found if way == "trained" else [*found, (size, whole)]))
    knee = curve["knee"]
    title = f"{TITLES[task]}, packaged Llama, {STEPS} steps"
    return curve_picture(lines, path, knee=(knee["parameters"], knee["loss"] + shift), title=title)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--ways", default=",".join([*BALANCED, "svd", *FIXED]))
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--picture", type=Path, help="draw the rank curve of the first task and seed to this file")
    parser.add_argument("--curves", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--out", type=Path, default=Path("runs/truncation"))
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    transformers_logging.set_verbosity_error()
    given.out.mkdir(parents=True, exist_ok=True)
    results = Results(given.out / "results.json")
    for seed in map(int, given.seeds.split(",")):
        for task in given.tasks.split(","):
            if given.ways:
                cuts(results, given.out, task, seed, given.ways.split(","))
            if given.curves:
                curves(results, given.out, task, seed)
    if given.picture is not None:
        picture(results.values, given.tasks.split(",")[0], int(given.seeds.split(",")[0]), given.picture)
    return results.values


if __name__ == "__main__":
    main()
