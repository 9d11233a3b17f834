"""`lorank sweep`: one recipe with many settings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lorank.cli.common import console, one_message, quiet_libraries
from lorank.extras import require

if TYPE_CHECKING:
    from lorank.experiments.sweep import Sweep
    from lorank.experiments.sweep.jobs import Place


def sweep(
    file: Annotated[
        Path,
        typer.Argument(metavar="SWEEP", help="A YAML file (base, space, sampler, …), or the name of a sweep's recipe."),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE",
            help="Changes to the sweep (sampler=tpe, trials=20, space.lora.r=[2, 4]) or to every run's configuration.",
        ),
    ] = None,
    jobs: Annotated[
        int,
        typer.Option("--jobs", "-j", min=1, help="Worker processes on this machine; with GPUs, one GPU each."),
    ] = 1,
    storage: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="The database with the trials, shared by every process that names it: postgresql+psycopg://… for many "
            "machines. Default: SQLite in output_dir.",
        ),
    ] = None,
    study: Annotated[
        str | None, typer.Option(metavar="NAME", help="The study in that database. Default: the name of the file.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be run, and write nothing.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output.")] = False,
) -> None:
    """Train a recipe with many settings, and compare the results.

    A trial is one setting with all its seeds; its value is the mean over the seeds, measured on validation data.
    Samplers: grid (every combination), random, tpe. One objective, or two with their Pareto front.

    Every run has its own folder, as in `lorank train`. The same command continues a sweep: finished trials are kept,
    interrupted ones continue from their last checkpoint, failed ones are tried again. Several processes with the same
    --storage and --study share the trials; if one is killed, another takes its trial.

    Writes table.md, table.csv, results.jsonl and pareto.png to output_dir.

    Examples:

    `lorank sweep ard_ablation`

    `lorank sweep ard_lambda_beta training.max_steps=50 output_dir=runs/short --jobs 2`

    `lorank sweep my.yaml sampler=tpe trials=40 --storage postgresql+psycopg://me@host/sweeps`
    """
    with one_message(interrupted="The same command continues: finished trials are kept."):
        require("lorank sweep", "matplotlib", "optuna")
        from lorank.experiments.sweep.file import read_sweep, split_overrides
        from lorank.experiments.sweep.storage import check_url

        # what follows takes seconds to import, so mistakes are found first
        read_sweep(file, split_overrides(overrides or ())[0])
        if storage is not None:
            check_url(storage)
        from lorank.experiments.sweep import load_sweep
        from lorank.experiments.sweep.jobs import place_of

        plan = load_sweep(file, overrides or ())
        place = place_of(plan, storage, study)
        if dry_run:
            _show_plan(plan, place, as_json=as_json)
        else:
            _run(plan, place, jobs, as_json=as_json)


def _run(plan: Sweep, place: Place, jobs: int, *, as_json: bool) -> None:
    from lorank.experiments import folder
    from lorank.experiments.sweep import run_sweep, tables
    from lorank.experiments.sweep.storage import DATABASE, default_url, shown

    own = [DATABASE] if place.url == default_url(plan.out) else []
    written = (tables.TABLE, tables.CSV, tables.LINES, tables.PICTURE, *own)
    folder.check_results(plan.out, written, runs=tables.MARKER)
    progress, output = console(stderr=True), console()
    quiet_libraries(progress)
    progress.print(f"{_size(plan)}; study {place.study} in {shown(place.url)}", highlight=False, markup=False)
    result = run_sweep(plan, place, jobs=jobs, console=progress, prepare=quiet_libraries)
    files = tables.write_results(result, plan.out)
    if as_json:
        typer.echo(json.dumps(tables.as_json(result, place.study, shown(place.url), files), indent=2))
    else:
        if result.finished:
            from rich.markup import escape

            title = f"{escape(plan.name)}: {len(result.finished)} of {plan.count} trials"
            output.print(tables.rich_table(result.finished, title))
            output.print(tables.conclusion(result), highlight=False, markup=False)
        earlier = len(result.finished) - result.new
        stopped = f", {len(result.pruned)} stopped early" if result.pruned else ""
        output.print(f"trials: {result.new} new, {earlier} finished before{stopped}", highlight=False)
        for path in files:
            output.print(f"written to {path}", highlight=False, markup=False, soft_wrap=True)
        output.print(f"look at it: optuna-dashboard {shown(place.url)}", highlight=False, markup=False, soft_wrap=True)
    for label, message in result.failures:
        progress.print(f"failed: {label}: {message}", highlight=False, markup=False, style="red")
    if result.unfinished:
        progress.print(
            f"{result.unfinished} trials are not finished, because workers stopped. The same command continues.",
            highlight=False,
        )
    if result.failures or result.unfinished:
        raise typer.Exit(1)


def _size(plan: Sweep) -> str:
    """The number of trials and runs."""
    seeds = max(1, len(plan.file.seeds))
    runs = f" × {seeds} seeds = {plan.count * seeds} runs" if seeds > 1 else ""
    return f"{plan.count} trial{'s' if plan.count != 1 else ''}{runs}, sampler {plan.file.sampler}"


def _show_plan(plan: Sweep, place: Place, *, as_json: bool) -> None:
    """Prints the trials of a grid, or the space of another sampler."""
    from lorank.experiments.sweep.storage import shown
    from lorank.experiments.sweep.worker import finished

    grid = plan.grid() if plan.file.sampler == "grid" else []
    over = [all(finished(run) is not None for run in setting.runs) for setting in grid]
    if as_json:
        values = {
            "study": place.study,
            "storage": shown(place.url),
            "output_dir": str(plan.out),
            "sampler": plan.file.sampler,
            "objectives": list(plan.file.objectives),
            "trials": plan.count,
            "seeds": list(plan.file.seeds),
            "space": dict(plan.file.space),
            "settings": [{**setting.settings, "finished": there} for setting, there in zip(grid, over, strict=True)],
        }
        typer.echo(json.dumps(values, indent=2, default=str))
        return
    output = console(soft_wrap=True)
    for setting, there in zip(grid, over, strict=True):
        output.print(
            f"{setting.slot + 1}: {setting.label}{'  (finished)' if there else ''}", highlight=False, markup=False
        )
    if not grid:
        for key, values in plan.file.space.items():
            output.print(f"{key}: {values}", highlight=False, markup=False)
    output.print(
        f"{_size(plan)}; objectives {', '.join(plan.file.objectives)}; study {place.study} in {shown(place.url)}\n"
        "Nothing was run or written. How long it takes is known after the first trial.",
        highlight=False,
        markup=False,
    )
