"""The command line: `lorank train`, `lorank demo`, `lorank prune`, `lorank resize`, `lorank curve`, and others.

Each command imports its slow modules itself, rich's tables included, so that `lorank --help` is fast.

An error that lorank raises on purpose, or a file system error, is printed as one message and the exit status is 2. Any
other error is a bug in lorank and shows its traceback.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from lorank._version import __version__
from lorank.cli import (
    compare,
    curve,
    doctor,
    export,
    init,
    merge,
    planted,
    prune,
    report,
    resize,
    score,
    show,
    sweep,
    train,
)
from lorank.cli.common import console, one_message, quiet_imports, quiet_libraries
from lorank.cli.hints import Command
from lorank.extras import require

app = typer.Typer(
    name="lorank",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_show_locals=False,
    help="""Allocates the ranks of LoRA modules while they train, and saves a plain PEFT adapter.

Try it offline in a few minutes: `lorank demo`

Train from a recipe, with changes: `lorank train e2e_alora training.lr=3e-4 output_dir=runs/mine`

What came out of it: `lorank show runs/mine`

A recipe of your own: `lorank init mine.yaml`. What works on this machine: `lorank doctor`

Resume an interrupted run: `lorank train e2e_alora --resume`

See what came out, in one HTML file: `lorank report runs/mine --open`

Halve any trained LoRA adapter: `lorank prune ADAPTER --data e2e_nlg --budget 50% --out smaller`

The same without data: `lorank resize ADAPTER --budget 50% --out smaller`

Where an adapter can be served, and in which form: `lorank export ADAPTER --check`
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
    quiet_imports()


app.command(cls=Command)(train.train)


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="The folder for the results.")] = Path("lorank-demo"),
    seed: Annotated[int, typer.Option(min=0, help="Seed of both runs.")] = 0,
) -> None:
    """Adapt the packaged tiny Llama to Python's reference manual, with ALoRA and with plain LoRA of equal total rank.

    Runs offline, in minutes on two cores. Writes both adapters, their histories and a picture of the ranks.
    """
    with one_message(interrupted="The same command starts again from the beginning."):
        require("lorank demo", "altair", "vl_convert")
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


app.command(cls=Command)(show.show)
app.command(cls=Command)(init.init)
app.command(cls=Command)(doctor.doctor)
app.command(cls=Command)(score.score)
app.command(cls=Command)(prune.prune)
app.command(cls=Command)(resize.resize)
app.command(cls=Command)(curve.curve)
app.command(cls=Command)(export.export)
app.command(cls=Command)(merge.merge)
app.command()(sweep.sweep)
app.command()(report.report)
app.command()(compare.compare)
app.command()(planted.planted)
