"""Does a score predict what a rank is worth?   python -m benchmarks.predictions --out runs/predictions.jsonl

Three tasks (those of benchmarks.quality). LoRA of rank 4 is trained. After 10 and 30 % of the run (where BalancedLoRA
makes its first and its last cut) and at its end, every rank is scored on 64 rows. The truth is the increase of the loss
on other rows when one rank is switched off. It is taken twice: for the ranks as they are, which all other scores are
about, and for the ranks of the balanced basis, which σ² is about. The number is Spearman's correlation between score
and truth over all ranks. For σ², the table also has Σ ½σ² / Σ truth: 1 if the predicted loss is right in size, too.

Each state is one line of OUT, written when it is done; a state that is there is not done again.
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

warnings.simplefilter("ignore")

import torch  # noqa: E402  # after the warnings of the libraries that it imports
from scipy.stats import spearmanr  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from transformers import set_seed  # noqa: E402
from transformers.utils import logging as transformers_logging  # noqa: E402

from benchmarks.quality import CASES, Task, order_of, task_of  # noqa: E402
from lorank.config.sections import ModelSettings  # noqa: E402
from lorank.experiments.models import load_model  # noqa: E402
from lorank.lora import AdapterLayers, LayerPlan, find_layers, make_peft_model, resize_  # noqa: E402
from lorank.scoring import (  # noqa: E402
    ablation_scores,
    balance,
    first_order_scores,
    measure_gramians,
    saliency_scores,
)

RANK, STEPS = 4, 200
MOMENTS = {"10 %": 0.1, "30 %": 0.3, "end": 1.0}
"""Fractions of the run."""
SCORED, TRUTH = 64, 96
"""Rows for scores, and other rows for the truth."""
ROWS = 8
"""Rows per batch of the Gramians."""
RATES = {"manual": 1e-2, "e2e": 1e-2, "clinc150": 2e-3}
SCORES = {
    "balanced": "σ², in the balanced basis",
    "first order, without": "first order, without",
    "first order, both": "first order, both terms",
    "ablation 32, without": "exact ablation on 32 rows, without",
    "ablation 32, both": "exact ablation on 32 rows, both terms",
    "saliency": "|gradient of the gate|, per four rows",
    "magnitude": "‖A_i‖ ‖B_i‖",
}


def measure(model: nn.Module, layers: AdapterLayers, task: Task) -> dict[str, Any]:
    """All scores of the present ranks against the truth. The adapter is in its balanced basis afterwards."""
    rows, others = task.validation[:SCORED], task.validation[SCORED : SCORED + TRUTH]
    truth_batch = task.collator(others)
    batches = [task.collator(rows[i : i + ROWS]) for i in range(0, len(rows), ROWS)]
    whole, few = task.collator(rows), task.collator(rows[:32])
    scores: dict[str, Mapping[str, Tensor]] = {
        "first order, without": first_order_scores(model, layers, whole, terms="without").scores,
        "first order, both": first_order_scores(model, layers, whole, terms="both").scores,
        "ablation 32, without": ablation_scores(model, layers, few, terms="without").scores,
        "ablation 32, both": ablation_scores(model, layers, few, terms="both").scores,
        "saliency": saliency_scores(model, layers, batches),
        "magnitude": {
            name: (layer.A.norm(dim=1) * layer.B.norm(dim=0)).detach().double() for name, layer in layers.items()
        },
    }
    truth = _flat(ablation_scores(model, layers, truth_batch, terms="without").scores)
    found = {name: float(spearmanr(_flat(values), truth).statistic) for name, values in scores.items()}
    balanced = {name: balance(layers[name], pair) for name, pair in measure_gramians(model, layers, batches).items()}
    resize_(layers, {name: LayerPlan(tuple(range(RANK)), basis=one.basis) for name, one in balanced.items()})
    turned = ablation_scores(model, layers, truth_batch, terms="without")
    worth, true = _flat({name: one.worth for name, one in balanced.items()}), _flat(turned.scores)
    found["balanced"] = float(spearmanr(worth, true).statistic)
    return {
        "spearman": found,
        "predicted over true": float(worth.sum() / 2 / true.sum()),
        "loss": turned.baseline,
        "truth in the present basis": truth.tolist(),
        "truth in the balanced basis": true.tolist(),
        "predicted": (worth / 2).tolist(),
    }


def _flat(scores: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([values.double().cpu() for values in scores.values()])


def states(name: str, out: Path, seed: int, moments: Sequence[str]) -> None:
    """Trains one task's adapter anew for each moment, and writes a line for it."""
    case, task = CASES[name], task_of(name)
    done = {(line["task"], line["moment"], line["seed"]) for line in _read(out)}
    for moment, steps in ((moment, round(MOMENTS[moment] * STEPS)) for moment in moments):
        if (name, moment, seed) in done:
            continue
        set_seed(seed)
        kind = "CAUSAL_LM" if task.model_kind == "causal_lm" else "SEQ_CLS"
        base = load_model(ModelSettings(name=case.model), task)
        model = make_peft_model(base, task_type=kind, r=RANK, lora_alpha=2 * RANK, target_modules="all-linear")
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATES[name])
        model.train()
        for step, rows in enumerate(order_of(len(task.train), case.batch, STEPS, seed)[:steps]):
            for group in optimizer.param_groups:
                group["lr"] = RATES[name] * min((step + 1) / (0.06 * STEPS), (STEPS - step) / (0.94 * STEPS), 1)
            model(**task.collator([task.train[i] for i in rows])).loss.backward()
            torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.grad is not None], 1.0)
            optimizer.step()
            optimizer.zero_grad()
        line = {"task": name, "moment": moment, "seed": seed, **measure(model, find_layers(model), task)}
        with out.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(name, moment, {k: round(v, 3) for k, v in line["spearman"].items()}, flush=True)


def _read(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []


def table(lines: list[dict[str, Any]]) -> str:
    """The table of docs/balanced.md, in Markdown."""
    columns = [(name, moment) for name in CASES for moment in MOMENTS]
    by_column = {(line["task"], line["moment"]): line for line in lines}
    present = [column for column in columns if column in by_column]
    head = "| score | " + " | ".join(f"{name}, {moment}" for name, moment in present) + " |"
    rows = [head, "|---|" + "---|" * len(present)]
    for key, title in SCORES.items():
        rows.append(f"| {title} | " + " | ".join(f"{by_column[c]['spearman'][key]:.2f}" for c in present) + " |")
    ratio = " | ".join(f"{by_column[c]['predicted over true']:.2f}" for c in present)
    rows.append(f"| Σ ½σ² over Σ truth | {ratio} |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", default=",".join(CASES), help="comma-separated")
    parser.add_argument(
        "--moments", default=",".join(MOMENTS), help=f"comma-separated: {', '.join(MOMENTS)}".replace("%", "%%")
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/predictions.jsonl"))
    given = parser.parse_args()
    moments = given.moments.split(",")
    if unknown := [moment for moment in moments if moment not in MOMENTS]:
        parser.error(f"unknown moments: {', '.join(unknown)}; there are {', '.join(MOMENTS)}")
    transformers_logging.set_verbosity_error()
    given.out.parent.mkdir(parents=True, exist_ok=True)
    for name in given.tasks.split(","):
        states(name, given.out, given.seed, moments)
    print(table(_read(given.out)))


if __name__ == "__main__":
    main()
