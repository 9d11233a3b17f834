"""`lorank demo`: the tiny Llama learns Python's reference manual, by LoRA, ALoRA and BalancedLoRA of equal size.

The demo needs no download. The package contains the model, pretrained on old books. Every Python contains the text,
``pydoc_data.topics``. So the change of domain is real. All runs have the same data, steps and learning rate, and three
of them the same number of trained parameters; the fourth is LoRA with twice as many, to compare with.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from lorank.config.settings import RunConfig, make_config
from lorank.experiments.folder import ADAPTER, CONFIG, HISTORY, check_results
from lorank.experiments.pictures import draw_runs
from lorank.experiments.run import RunResult, train

RANK = 4
SETTINGS: Mapping[str, Any] = {
    "model": {"name": "tiny"},
    "task": {"name": "language_modelling", "data": "python_reference", "block_size": 64, "max_eval": 128},
    # lr: the best of four learning rates for static LoRA on the validation part (docs/demo.md)
    "training": {"epochs": 1, "max_steps": 120, "batch_size": 8, "lr": 1e-2, "eval_steps": 60},
}
METHODS: Mapping[str, Mapping[str, Any]] = {
    "static": {"name": "static"},
    "alora": {"name": "alora", "budget": "100% of adapter"},
    "balanced": {"name": "balanced"},
    "double": {"name": "static"},
}
RANKS = {"double": 2 * RANK}
"""The ranks of the adapters that do not begin with ``RANK``."""
PICTURE = "ranks.png"
TITLES = {"static": "LoRA", "alora": "ALoRA", "balanced": "BalancedLoRA", "double": "LoRA, twice the size"}


def main(
    output: str | Path = "lorank-demo",
    *,
    seed: int = 0,
    console: Console | None = None,
    progress: Console | None = None,
) -> dict[str, RunResult]:
    """Runs all methods. Writes the same files as `lorank train` for each, and a picture of the ranks.

    Args:
        output: the folder; results of an earlier demo in it are replaced.
        seed: the seed of all runs.
        console: prints the table; None: standard output.
        progress: shows the progress of each run; None: standard error. If lorank's log goes to a console too, it must
            be this one, or its lines break the view.

    Returns:
        The result of each run, by its name: `static`, `alora`, `balanced` and `double`.

    Raises:
        RunFolderError: a method's folder holds something that is not a run, or the picture would replace a file that
            is not of a demo.
    """
    console, progress = console or Console(), progress or Console(stderr=True)
    output = Path(output)
    check_results(output, [PICTURE], runs=f"alora/{CONFIG}")
    began = time.perf_counter()
    console.print(
        "A Llama of 3 M parameters, pretrained on old books, learns Python's reference manual, in four runs: about a "
        "minute and a half on two cores."
    )
    results = {}
    for number, method in enumerate(METHODS, 1):
        console.print(f"[bold]{number} of {len(METHODS)}: {TITLES[method]}[/]")
        results[method] = train(
            demo_config(method, output, seed), overwrite=(output / method).exists(), console=progress
        )
    picture = draw_runs(
        {TITLES[name]: result.folder for name, result in results.items()},
        output / PICTURE,
        title="Where the ranks went, and what it brought, on Python's reference manual (one seed)",
        metric="validation loss",
    )
    console.print(comparison(results))
    console.print(conclusion({name: result.metrics["validation"]["loss_after"] for name, result in results.items()}))
    balanced = results["balanced"].folder
    console.print(f"picture of the ranks {picture}", highlight=False, markup=False)
    console.print(f"history of ranks     {balanced / HISTORY}", highlight=False, markup=False)
    console.print(
        f"the adapter          {balanced / ADAPTER}   (plain PEFT: PeftModel.from_pretrained)", highlight=False
    )
    console.print(f"{time.perf_counter() - began:.0f} seconds in total", highlight=False)
    return results


def demo_config(method: str, output: Path, seed: int) -> RunConfig:
    """The configuration of one of the runs."""
    rank = RANKS.get(method, RANK)
    values = {**SETTINGS, "allocator": METHODS[method], "output_dir": str(output / method)}
    values["lora"] = {"r": rank, "alpha": 2 * rank}
    values["training"] = {**values["training"], "seed": seed}
    return make_config(values, source="demo")


def conclusion(losses: Mapping[str, float]) -> str:
    """What came out, in a sentence.

    Args:
        losses: the validation loss after each run.
    """
    gains = {name: losses["static"] - loss for name, loss in losses.items()}

    def change(name: str) -> str:
        return f"{abs(gains[name]):.3f} {'below' if gains[name] > 0 else 'above'}"

    return (
        f"With as many parameters as LoRA, BalancedLoRA ends {change('balanced')} its loss and ALoRA "
        f"{change('alora')}; LoRA of twice the size ends {change('double')}. One seed: docs/balanced.md has five."
    )


def comparison(results: Mapping[str, RunResult]) -> Table:
    """A table that compares the methods."""
    table = Table(title="Python's reference manual, validation part")
    table.add_column("")
    for method in results:
        table.add_column(TITLES[method], justify="right")
    metrics = [result.metrics for result in results.values()]
    table.add_row("trained parameters", *(f"{m['final']['trainable_parameters']:,}" for m in metrics))
    table.add_row("… when largest", *(f"{m['widest']['parameters']:,}" for m in metrics))
    table.add_row("ranks", *(str(m["final"]["ranks"]) for m in metrics))
    table.add_row("loss before", *(f"{m['validation']['loss_before']:.3f}" for m in metrics))
    table.add_row("loss after", *(f"{m['validation']['loss_after']:.3f}" for m in metrics))
    table.add_row("seconds training", *(f"{m['seconds']['training']:.1f}" for m in metrics))
    table.add_row("… moving ranks", *(f"{m['seconds']['scoring']:.1f}" for m in metrics))
    return table
