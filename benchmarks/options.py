"""What each option of ALoRA and ARD-LoRA changes, on Python's manual.   python -m benchmarks.options

The task, the budget and the loop are those of ``benchmarks/quality.py``: the packaged Llama, rank 2 in every map. All
runs have one learning rate, 0.01, and 200 steps. The table shows the loss on the report part, and the difference to the
method's own form with the same seed: mean ± standard error over seeds.

Every run is one line of ``OUT``. The same command continues where it was interrupted; ``--table`` prints what there is.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers.utils import logging as transformers_logging

import lorank
from benchmarks import quality
from benchmarks.quality import METHODS, Method, Results, Run

LR, STEPS, SEEDS = 0.01, 200, (0, 1, 2)
FULL = "100% of adapter"
GRADIENT, MEAN = {"new_ranks": "gradient"}, {"second_moments": "mean"}


def _alora(title: str, **settings: object) -> Method:
    return Method(title, lambda: lorank.ALoRA(budget=FULL, **settings))  # type: ignore[arg-type]


def _ard(title: str, **settings: object) -> Method:
    # 162 heads and modules with a rank each would be more than the budget
    return Method(title, lambda: lorank.ARDLoRA(budget=FULL, min_rank=0, **settings))  # type: ignore[arg-type]


OPTIONS: dict[str, tuple[str, Method]] = {
    "alora": ("alora", METHODS["alora"]),
    "alora_gradient": ("alora", _alora('`new_ranks="gradient"`', **GRADIENT)),
    "alora_mean": ("alora", _alora('`second_moments="mean"`', **MEAN)),
    "alora_both": ("alora", _alora('`new_ranks="gradient"`, `second_moments="mean"`', **GRADIENT, **MEAN)),
    "alora_rotate": ("alora", _alora("`rotate=True`", rotate=True)),
    "alora_balanced": ("alora", _alora('`scores="balanced"`', scores="balanced")),
    "alora_without": ("alora", _alora('`terms="without"`', terms="without")),
    "alora_per_parameter": (
        "alora_without",
        _alora('`terms="without"`, `per_parameter=True`', terms="without", per_parameter=True),
    ),
    "alora_all": (
        "alora",
        _alora(
            'balanced scores per parameter, `new_ranks="gradient"`, `second_moments="mean"`',
            scores="balanced",
            per_parameter=True,
            **GRADIENT,
            **MEAN,
        ),
    ),
    "ard": ("ard", _ard("ARD-LoRA, `min_rank=0`")),
    "ard_gradient": ("ard", _ard('`new_ranks="gradient"`', **GRADIENT)),
    "ard_mean": ("ard", _ard('`second_moments="mean"`', **MEAN)),
    "ard_both": ("ard", _ard('`new_ranks="gradient"`, `second_moments="mean"`', **GRADIENT, **MEAN)),
}
"""Each contender, with the one that it is compared to."""


def table(results: Results) -> str:
    """The table of the runs that are done, in Markdown."""
    loss = {(line["method"], line["seed"]): line["report"] for line in results.read()}
    size = {(line["method"], line["seed"]): line["parameters"] for line in results.read()}
    rows = ["| options | loss | difference | parameters at the end | seeds |", "|---|---|---|---|---|"]
    for name, (own, method) in OPTIONS.items():
        seeds = [seed for seed in SEEDS if (name, seed) in loss and (own, seed) in loss]
        if not seeds:
            continue
        losses = torch.tensor([loss[name, seed] for seed in seeds], dtype=torch.float64)
        change = losses - torch.tensor([loss[own, seed] for seed in seeds], dtype=torch.float64)
        error = f" ± {float(change.std()) / len(seeds) ** 0.5:.3f}" if len(seeds) > 1 else ""
        parameters = round(sum(size[name, seed] for seed in seeds) / len(seeds))
        difference = "–" if name == own else f"{float(change.mean()):+.3f}{error}"
        rows.append(f"| {method.title} | {float(losses.mean()):.3f} | {difference} | {parameters:,} | {len(seeds)} |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", default=",".join(OPTIONS), help="comma-separated, in the order to run them")
    parser.add_argument("--out", type=Path, default=Path("runs/options.jsonl"))
    parser.add_argument("--table", action="store_true", help="print the table and do nothing")
    given = parser.parse_args()
    results = Results(given.out)
    if given.table:
        print(table(results))
        return
    torch.set_num_threads(1)
    transformers_logging.set_verbosity_error()
    METHODS.update({name: method for name, (_, method) in OPTIONS.items()})
    for seed in SEEDS:
        for name in given.methods.split(","):
            run = Run("manual", name, STEPS, LR, seed)
            if results.claim(run):
                results.add(run, quality.train(run, given.out.with_suffix(".adapters")))
                print(f"{name} seed {seed} done", flush=True)


if __name__ == "__main__":
    main()
