"""`lorank sweep`: one recipe with many settings."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lorank.cli.common import console, one_message, quiet_libraries
from lorank.extras import require


def sweep(
    file: Annotated[
        Path, typer.Argument(metavar="SWEEP", help="A YAML file: base, variants, grid, seeds, output_dir.")
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Changes to every run's configuration, or the sweep's output_dir."),
    ] = None,
) -> None:
    """Train a recipe with many settings, and compare the results.

    Every run has its own folder, as in `lorank train`. Finished runs are skipped and interrupted runs continue. A run
    that fails does not stop the others. Writes table.md, table.csv and pareto.png to output_dir.

    Examples:

    `lorank sweep ard_ablation`

    `lorank sweep ard_lambda_beta training.max_steps=50 output_dir=runs/short`
    """
    with one_message(interrupted="The same command continues: finished runs are kept."):
        require("lorank sweep", "matplotlib")
        from lorank.experiments.sweep_file import read_sweep

        # what follows takes seconds to import, so mistakes are found first
        read_sweep(file, [text for text in overrides or () if text.partition("=")[0].strip() == "output_dir"])
        from rich.markup import escape

        from lorank.experiments import folder
        from lorank.experiments.sweep import load_sweep, run_sweep
        from lorank.experiments.sweep_table import CSV, PICTURE, TABLE, rich_table, write_results

        out, runs = load_sweep(file, overrides or ())
        folder.check_results(out, (TABLE, CSV, PICTURE), runs=f"*/seed*/{folder.CONFIG}")
        progress = console(stderr=True)
        quiet_libraries(progress)
        result = run_sweep(runs, console=progress)
        output = console()
        files = write_results(result, out)
        if result.finished:
            output.print(
                rich_table(result.finished, f"{escape(str(file))}: {len(result.finished)} of {len(runs)} runs")
            )
        output.print(f"runs: {result.new} new, {len(result.finished) - result.new} finished before", highlight=False)
        for written in files:
            output.print(f"written to {written}", highlight=False, markup=False)
        for label, seed, message in result.failures:
            progress.print(f"[bold red]failed:[/] {escape(f'{label}, seed {seed}: {message}')}", highlight=False)
        if result.failures:
            raise typer.Exit(1)
