"""`lorank train`: one run from a configuration."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorank.cli.common import Json, console, json_output, one_message, quiet_libraries
from lorank.experiments.time_left import duration

if TYPE_CHECKING:
    from rich.table import Table

    from lorank.config.settings import RunConfig
    from lorank.experiments import RunResult


def train(
    config: Annotated[
        Path, typer.Argument(metavar="CONFIG", help="The name of a recipe, such as e2e_alora, or your own YAML file.")
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Changes to the configuration: dotted keys, values in YAML."),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the run's last complete checkpoint.")] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Remove the run in output_dir and start again.")
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Check everything, print steps, parameters, budget and time, and write nothing."
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Train one adapter from a YAML configuration.

    The run's folder (output_dir) receives the plain PEFT adapter, the history of its ranks, the metrics in
    metrics.json, the configuration with every default, and checkpoints.

    Examples:

    `lorank train e2e_alora`

    `lorank train e2e_alora --dry-run`

    `lorank train e2e_alora allocator.rounds=4 training.max_steps=200 output_dir=runs/short`

    `lorank train e2e_alora 'allocator={name: static}' output_dir=runs/plain_lora`
    """
    interrupted = "The same command with --resume continues from the last checkpoint."
    with one_message("Nothing was written." if dry_run else interrupted), json_output(as_json) as write_json:
        # what follows takes seconds to import, so mistakes are found first
        from lorank.config.early_checks import check_sections
        from lorank.experiments.folder_check import check_folder

        sections = check_sections(config, overrides or ())
        check_folder(Path(sections.output_dir), resume=resume, overwrite=overwrite)
        from lorank import experiments
        from lorank.config import load_config

        settings = load_config(config, overrides or ())

        progress = console(stderr=True)
        quiet_libraries(progress)
        if dry_run:
            from lorank.experiments.dry_run import dry_run as check

            found = check(settings)
            if as_json:
                write_json(found)
            else:
                console().print(_plan(settings, found))
            return
        result = experiments.train(settings, resume=resume, overwrite=overwrite, console=progress)
        from lorank.experiments.pictures import draw_run

        picture = draw_run(result.folder)
        if as_json:
            write_json({"folder": str(result.folder), **result.metrics})
        else:
            console().print(_summary(result, picture))


def _summary(result: RunResult, picture: Path | None) -> Table:
    from rich.markup import escape
    from rich.table import Table

    metrics: Mapping[str, Any] = result.metrics
    start, final, validation, seconds = (metrics[key] for key in ("start", "final", "validation", "seconds"))
    table = Table(title=escape(f"{metrics['model']} · {metrics['data']} · {metrics['allocator']}"), show_header=False)
    table.add_row("total rank", f"{start['ranks']} → {final['ranks']} in {final['modules']} modules")
    table.add_row("trainable parameters", f"{start['trainable_parameters']:,} → {final['trainable_parameters']:,}")
    if metrics["budget"]:
        table.add_row("budget", _budget(metrics["budget"]))
    table.add_row("allocations", f"{metrics['allocations']}, {metrics['ranks_moved']} ranks pruned or added")
    if metrics["note"]:
        table.add_row("[bold yellow]note[/]", metrics["note"])
    best = f", best at {metrics['best_step']}" if metrics["best_step"] else ""
    table.add_row("steps", f"{metrics['steps']}{best}")
    table.add_row("validation loss", f"{validation['loss_before']:.4f} → {validation['loss_after']:.4f}")
    for name, value in metrics["test"].items():
        table.add_row(f"test {name.replace('_', ' ')}", f"{value:.4f}")
    table.add_row("seconds", f"{seconds['training']:.0f} training, of which {seconds['scoring']:.0f} scoring")
    table.add_row("written to", escape(str(result.folder)))
    table.add_row("to serve it", f"lorank export {escape(str(result.folder))} --check")
    if picture is not None:
        table.add_row("picture of the ranks", escape(str(picture)))
    table.add_row("what moved", escape(f"lorank show {result.folder}"))
    return table


def _plan(config: RunConfig, found: Mapping[str, Any]) -> Table:
    from rich.markup import escape
    from rich.table import Table

    name = f"{config.model.name} · {config.task.data} · {config.allocator.name}"
    table = Table(title=escape(f"{name}: checked, nothing was written"), show_header=False)
    examples, made, start = found["examples"], found["made"], found["start"]
    table.add_row("examples", f"{examples['train']:,} to train on, {examples['validation']:,} for validation")
    table.add_row("steps", f"{found['steps']:,}, and {found['evaluations']} evaluations")
    table.add_row("base model", f"{found['base_parameters']:,} parameters")
    table.add_row("total rank", f"{made['ranks']} as made, {start['ranks']} at the start, in {made['modules']} modules")
    share = 100 * start["trainable_parameters"] / found["base_parameters"]
    table.add_row("trainable parameters", f"{start['trainable_parameters']:,} at the start ({share:.3g} % of base)")
    table.add_row("budget", _budget(found["budget"]) if found["budget"] else "none")
    due = found["allocations"]
    shown = ", ".join(map(str, due[:6])) + (f", … ({len(due)} times)" if len(due) > 6 else "")
    table.add_row("ranks move", f"after step {shown}" if due else "not while training")
    steps = duration(found["steps"] * found["seconds_per_step"])
    table.add_row("time", f"about {steps} for the steps, as one was measured; scoring and evaluation come on top")
    table.add_row("output_dir", escape(config.output_dir))
    return table


def _budget(budget: Mapping[str, Mapping[str, float]]) -> str:
    from lorank.training.summary import budget_text

    return budget_text(budget)
