"""`lorank demo`: the tiny Llama learns Python's reference manual, once with static LoRA and once with ALoRA.

The demo needs no download. The package contains the model, pretrained on old books. Every Python contains the text,
``pydoc_data.topics``. So the change of domain is real. Both runs have the same budget, data, steps and learning
rate.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from lorank.config.settings import RunConfig, make_config
from lorank.experiments.folder import CONFIG, check_results
from lorank.experiments.run import RunResult, train
from lorank.report import rank_heatmap
from lorank.training import read_history

SETTINGS: Mapping[str, Any] = {
    "model": {"name": "tiny"},
    "lora": {"r": 4, "alpha": 8},
    "task": {"name": "language_modelling", "data": "python_reference", "block_size": 64, "max_eval": 128},
    "allocator_samples": 8,  # the paper uses 32; a quarter of that keeps the demo short
    # lr: the best of four learning rates for static LoRA on the validation part (docs/demo.md)
    "training": {"epochs": 1, "max_steps": 120, "batch_size": 8, "lr": 1e-2, "eval_steps": 40},
}
METHODS: Mapping[str, Mapping[str, Any]] = {
    "static": {"name": "static"},
    "alora": {
        "name": "alora",
        "scores": "exact",
        "unit": "steps",
        "k1": 30,
        "k2": 30,
        "rounds": 3,
        "budget": "100% of adapter",
    },
}
PICTURE = "ranks.png"
TITLES = {"static": "LoRA, static", "alora": "ALoRA"}


def main(output: str | Path = "lorank-demo", *, seed: int = 0, console: Console | None = None) -> dict[str, RunResult]:
    """Runs both methods. Writes the same files as `lorank train` for each method, and a picture of the ranks.

    Args:
        output: the folder; results of an earlier demo in it are replaced.
        seed: the seed of both runs.
        console: prints the table; None: standard output.

    Returns:
        The result of each method, by its name: `static` and `alora`.

    Raises:
        RunFolderError: a method's folder holds something that is not a run, or the picture would replace a file that
            is not of a demo.
    """
    console = console or Console()
    output = Path(output)
    check_results(output, [PICTURE], runs=f"alora/{CONFIG}")
    began = time.perf_counter()
    console.print("A Llama of 3 M parameters, pretrained on old books, learns Python's reference manual.")
    results = {}
    for number, method in enumerate(METHODS, 1):
        console.print(f"[bold]{number} of {len(METHODS)}: {TITLES[method]}[/]")
        results[method] = train(demo_config(method, output, seed), overwrite=(output / method).exists())
    history = read_history(results["alora"].folder / "rank_history.jsonl")
    picture = rank_heatmap(
        {"before": history[0].ranks, "after": history[-1].ranks},
        output / PICTURE,
        title=f"ALoRA on Python's reference manual, {len(history) - 1} allocations",
    )
    console.print(comparison(results))
    alora = results["alora"].folder
    console.print(f"picture of the ranks {picture}", highlight=False, markup=False)
    console.print(f"history of ranks     {alora / 'rank_history.jsonl'}", highlight=False, markup=False)
    console.print(
        f"the adapter          {alora / 'adapter'}   (plain PEFT: PeftModel.from_pretrained)", highlight=False
    )
    console.print(f"{time.perf_counter() - began:.0f} seconds in total", highlight=False)
    return results


def demo_config(method: str, output: Path, seed: int) -> RunConfig:
    """The configuration of one of the two runs."""
    values = {**SETTINGS, "allocator": METHODS[method], "output_dir": str(output / method)}
    values["training"] = {**values["training"], "seed": seed}
    return make_config(values, source="demo")


def comparison(results: Mapping[str, RunResult]) -> Table:
    """A table that compares the methods."""
    table = Table(title="Python's reference manual, validation part")
    table.add_column("")
    for method in results:
        table.add_column(TITLES[method], justify="right")
    metrics = [result.metrics for result in results.values()]
    table.add_row("total rank", *(f"{m['final']['ranks']} in {m['final']['modules']} modules" for m in metrics))
    table.add_row("trainable parameters", *(f"{m['final']['trainable_parameters']:,}" for m in metrics))
    table.add_row("validation loss before", *(f"{m['validation']['loss_before']:.4f}" for m in metrics))
    table.add_row("validation loss after", *(f"{m['validation']['loss_after']:.4f}" for m in metrics))
    table.add_row("seconds training", *(f"{m['seconds']['training']:.1f}" for m in metrics))
    table.add_row("… of which scoring", *(f"{m['seconds']['scoring']:.1f}" for m in metrics))
    return table
