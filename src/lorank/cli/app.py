"""The command line: `lorank train`, `lorank demo`, `lorank prune`, `lorank resize`, `lorank curve`, and others.

Each command imports its slow modules itself, rich's tables included, so that `lorank --help` is fast.

An error that lorank raises on purpose, or a file system error, is printed as one message and the exit status is 2. Any
other error is a bug in lorank and shows its traceback.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorank._version import __version__
from lorank.cli import curve, planted, posthoc, resize, show, sweep
from lorank.cli.common import console, one_message, quiet_libraries
from lorank.extras import require

if TYPE_CHECKING:
    from rich.table import Table

    from lorank.experiments import RunResult

app = typer.Typer(
    name="lorank",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_show_locals=False,
    help="""Allocates the ranks of LoRA modules while they train, and saves a plain PEFT adapter.

Try it offline in a few minutes: `lorank demo`

Train from a recipe, with changes: `lorank train e2e_alora training.lr=3e-4 output_dir=runs/mine`

Resume an interrupted run: `lorank train e2e_alora --resume`

Halve any trained LoRA adapter: `lorank prune ADAPTER --data e2e_nlg --budget 50% --out smaller`

The same without data: `lorank resize ADAPTER --budget 50% --out smaller`
""",
)


def _show_version(shown: bool) -> None:
    if shown:
        typer.echo(f"lorank {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


@app.command()
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
) -> None:
    """Train one adapter from a YAML configuration.

    The run's folder (output_dir) receives the plain PEFT adapter, the history of its ranks, the metrics in
    metrics.json, the configuration with every default, and checkpoints.

    Examples:

    `lorank train e2e_alora`

    `lorank train e2e_alora allocator.rounds=4 training.max_steps=200 output_dir=runs/short`

    `lorank train e2e_alora 'allocator={name: static}' output_dir=runs/plain_lora`
    """
    with one_message(interrupted="The same command with --resume continues from the last checkpoint."):
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
        result = experiments.train(settings, resume=resume, overwrite=overwrite, console=progress)
        console().print(_summary(result))


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="The folder for the results.")] = Path("lorank-demo"),
    seed: Annotated[int, typer.Option(min=0, help="Seed of both runs.")] = 0,
) -> None:
    """Adapt the packaged tiny Llama to Python's reference manual, with ALoRA and with plain LoRA of equal total rank.

    Runs offline, in minutes on two cores. Writes both adapters, their histories and a picture of the ranks.
    """
    with one_message(interrupted="The same command starts again from the beginning."):
        require("lorank demo", "matplotlib")
        from lorank.experiments.demo import main as run_demo

        progress = console(stderr=True)
        quiet_libraries(progress)
        run_demo(output, seed=seed, progress=progress)


@app.command()
def schema() -> None:
    """Print the JSON schema of a configuration file, for completion and checking in editors.

    Example: `lorank schema > lorank.schema.json`. Then write as the first line of a recipe:
    `# yaml-language-server: $schema=lorank.schema.json`
    """
    with one_message():
        from lorank.config.settings import json_schema

        typer.echo(json.dumps(json_schema(), indent=2))


app.command()(show.show)
app.command()(posthoc.score)
app.command()(posthoc.prune)
app.command()(resize.resize)
app.command()(curve.curve)
app.command()(sweep.sweep)
app.command()(planted.planted)


def _summary(result: RunResult) -> Table:
    from rich.markup import escape
    from rich.table import Table

    metrics: Mapping[str, Any] = result.metrics
    start, final, validation, seconds = (metrics[key] for key in ("start", "final", "validation", "seconds"))
    table = Table(title=escape(f"{metrics['model']} · {metrics['data']} · {metrics['allocator']}"), show_header=False)
    table.add_row("total rank", f"{start['ranks']} → {final['ranks']} in {final['modules']} modules")
    table.add_row("trainable parameters", f"{start['trainable_parameters']:,} → {final['trainable_parameters']:,}")
    for unit, amount in (metrics["budget"] or {}).items():
        table.add_row("budget", f"{amount['used']:,.6g} of {amount['limit']:,.6g} {unit.replace('_', ' ')}")
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
    return table
