"""`lorank compare`: methods at equal final parameters, each at its own best learning rate."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorank.cli.common import console, one_message, quiet_libraries
from lorank.extras import require

if TYPE_CHECKING:
    from lorank.experiments.compare.file import Comparison

LISTED = 60
"""The most runs that --dry-run lists."""


def compare(
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="RECIPE… [KEY=VALUE]…",
            help="Comparisons: names of recipes, such as compare_e2e, or YAML files. Then changes: keys of the "
            "comparison (seeds=[0,1,2]) or of its base (training.max_steps=50).",
        ),
    ],
    jobs: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Number of processes, each with its share of the cores; with several GPUs, each has one of them. "
            "[default: the number of GPUs, else 1]",
        ),
    ] = None,
    quick: Annotated[
        bool,
        typer.Option(
            "--quick",
            help="A first look in a few minutes: the first budget, two rates, two seeds, a third of the steps.",
        ),
    ] = False,
    methods: Annotated[
        str | None, typer.Option(help="Only these methods and the baseline, separated by commas.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List the runs, estimate the time from a few steps, and start nothing.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print comparison.json instead of tables.")] = False,
) -> None:
    """Compare methods fairly: equal final parameters, a learning rate for each, fresh seeds.

    For every method and budget, the learning rate with the lowest validation loss is found; the grid grows by factors
    of two until both neighbours of the best rate are worse. Then other seeds are trained at this rate, and measured on
    test data. You get means, intervals of the differences (paired bootstrap over seeds and test examples), the size of
    the LoRA that would be as good, and a sentence for each method.

    Finished runs are kept: after an interruption, also a kill, the same command continues. Writes results.jsonl,
    runs.parquet, comparison.json and table.md to output_dir.

    Examples:

    `lorank compare compare_e2e --jobs 2`

    `lorank compare compare_e2e --quick`

    `lorank compare compare_e2e --methods BalancedLoRA,ALoRA budgets=[4] seeds=[0,1,2,3,4] output_dir=runs/mine`
    """
    recipes = [word for word in words if "=" not in word]
    overrides = [word for word in words if "=" in word]
    with one_message(interrupted="The same command continues: finished runs are kept."):
        require("lorank compare", "scipy", "pyarrow")
        from lorank.config.errors import ConfigError
        from lorank.experiments.compare.file import read_comparison

        if not recipes:
            raise ConfigError("name a comparison: a recipe, such as compare_e2e, or your own YAML file")
        if len(recipes) > 1 and any(word.startswith("output_dir=") for word in overrides):
            raise ConfigError("output_dir=… is one folder, and each comparison needs its own: run them one by one")
        chosen = None if methods is None else [name.strip() for name in methods.split(",") if name.strip()]
        # what follows takes seconds to import, so mistakes are found first
        comparisons = [read_comparison(recipe, overrides, methods=chosen, quick=quick) for recipe in recipes]
        for comparison in comparisons:
            _compare(comparison, jobs=jobs, dry_run=dry_run, as_json=as_json)


def _compare(comparison: Comparison, *, jobs: int | None, dry_run: bool, as_json: bool) -> None:
    from rich.markup import escape

    from lorank.cli.study_progress import StudyProgress
    from lorank.experiments.compare.comparison import assess, make_subject, results_of, run_comparison, tidy_rows
    from lorank.experiments.compare.tables import COMPARISON, PARQUET, TABLE, rich_tables, sentences, write_results
    from lorank.experiments.folder import check_results
    from lorank.experiments.job_environment import visible_gpus

    notices, output = console(stderr=True), console()
    quiet_libraries(notices)
    out = Path(comparison.file.output_dir)
    subject = make_subject(comparison)
    check_results(out, (COMPARISON, TABLE, PARQUET), runs=subject.file)
    gpus = visible_gpus()
    devices = gpus if len(gpus) > 1 else []
    count = jobs or max(1, len(devices))
    notices.print(f"[bold]{escape(comparison.name)}[/]: {_content(comparison)}", highlight=False)
    if comparison.quick:
        notices.print("[yellow]A quick look, not a result:[/] fewer rates, seeds and steps.", highlight=False)
    # a run's own messages, such as a method's warnings, would be repeated for every run
    logging.getLogger("lorank").setLevel(logging.ERROR)
    if dry_run:
        _show_plan(comparison, subject, count)
        return
    with StudyProgress(notices) as progress:
        known = run_comparison(comparison, subject, jobs=count, devices=devices, report=progress)
    result = assess(comparison, subject, known)
    files = write_results(result, tidy_rows(comparison, subject, known), out)
    if as_json:
        typer.echo(json.dumps(result, indent=1))
        return
    for table, budget in zip(rich_tables(result), result["budgets"], strict=True):
        output.print(table)
        for told in sentences(result, budget):
            output.print(f"• {told}", highlight=False, markup=False)
        output.print()
    output.print(result["sentence"], highlight=False, markup=False, style="bold")
    for written in [results_of(comparison, subject).path, *files]:
        output.print(f"written to {written}", highlight=False, markup=False)


def _content(comparison: Comparison) -> str:
    file = comparison.file
    references = f" and LoRA of {len(file.references)} sizes" if file.references else ""
    rates = "their own rates" if comparison.base is None else f"{len(file.lrs)} rates or more"
    return (
        f"{len(file.methods)} method{'s' if len(file.methods) > 1 else ''}{references} × {len(file.budgets)} "
        f"budget{'s' if len(file.budgets) > 1 else ''} × {rates}, tuned on seeds {_list(file.tuning_seeds)}, "
        f"tested on seeds {_list(file.seeds)}"
    )


def _list(values: list[int]) -> str:
    return ", ".join(map(str, values))


def _show_plan(comparison: Comparison, subject: Any, jobs: int) -> None:
    from lorank.experiments.compare.comparison import results_of, wanted_runs
    from lorank.experiments.study.trials import seconds_left
    from lorank.experiments.time_left import duration

    known = results_of(comparison, subject).read()
    wanted = wanted_runs(comparison, subject, known)
    trials = {trial.fingerprint: trial for trial in wanted.trials}
    missing = [trial for name, trial in trials.items() if name not in known]
    output = console()
    for trial in missing[:LISTED]:
        output.print(trial.label, highlight=False, markup=False)
    if len(missing) > LISTED:
        output.print(f"… and {len(missing) - LISTED} more", highlight=False)
    total, done = len(trials) + wanted.later, len(trials) - len(missing)
    output.print(
        f"{total} runs, {done} of them finished. {wanted.later} are test runs whose rates are not chosen yet. Grids "
        "that must grow add a few.",
        highlight=False,
    )
    later = [*wanted.kinds]
    seconds = seconds_left([*(trial.kind for trial in missing), *later], trials, known)
    if seconds is None:
        each = subject.estimate()
        seconds, why = (
            each * (total - done),
            f"{duration(each)} a run, measured on a few steps of plain LoRA; others take longer",
        )
    else:
        why = "from the runs that are finished"
    output.print(
        f"About {duration(seconds / jobs)} with --jobs {jobs} ({why}), if the machine has a core for each job.",
        highlight=False,
    )
