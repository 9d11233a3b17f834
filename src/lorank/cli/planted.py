"""`lorank planted`: how close each method comes to the known true allocation."""

from __future__ import annotations

import logging
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from lorank.cli.common import console, one_message, quiet_libraries
from lorank.extras import require


class Where(str, Enum):
    """Where ranks are planted."""

    modules = "modules"
    heads = "heads"


class Sized(str, Enum):
    """What is equal for all planted ranks."""

    weight = "weight"
    effect = "effect"


def planted(
    out: Annotated[Path, typer.Option(help="The folder for the runs and results of this scenario.")] = Path(
        "runs/planted"
    ),
    where: Annotated[Where, typer.Option(help="Plant ranks in whole modules, or in attention heads.")] = Where.modules,
    methods: Annotated[str, typer.Option(help="Methods, separated by commas, or all.")] = "all",
    seeds: Annotated[str, typer.Option(help="Seeds of the reported runs, separated by commas.")] = "0,1,2,3,4",
    tuning_seeds: Annotated[
        str, typer.Option(help="Seeds for choosing learning rates, separated by commas.")
    ] = "100,101",
    steps: Annotated[int | None, typer.Option(min=20, help="Optimiser steps of every student. [default: 2400]")] = None,
    sized: Annotated[
        Sized,
        typer.Option(
            help="What is equal for all planted ranks: their size relative to the weight, or (harder) their effect on "
            "the logits."
        ),
    ] = Sized.weight,
    jobs: Annotated[int, typer.Option(min=1, help="Number of processes, each on one core.")] = 1,
    device: Annotated[str, typer.Option(help="The device for training students: cpu, cuda, cuda:1, …")] = "cpu",
) -> None:
    """Plant updates of known ranks in the tiny Llama, and measure which method finds the modules that have them.

    Every method has a budget of as many ranks as were planted. All methods have the same number of steps and of
    settings to tune; tuning uses separate seeds. Uniform, random and true ranks are run for comparison. Runs offline.
    After an interruption, the same command continues and keeps finished runs. Writes runs.jsonl, table.md and gap.png.

    Examples:

    `lorank planted --methods uniform,oracle,random,alora --out runs/planted`

    `lorank planted --where heads --out runs/planted_heads --jobs 2`
    """
    with one_message(interrupted="The same command continues: finished runs are kept."):
        require("lorank planted", "matplotlib")
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        from lorank.experiments.folder import check_results
        from lorank.experiments.planted.methods import METHODS
        from lorank.experiments.planted.metrics import MOST_EXACT
        from lorank.experiments.planted.problem import Scenario
        from lorank.experiments.planted.study import RUNS, PlantedError, run_study
        from lorank.experiments.planted.table import PICTURE, TABLE, rich_table, write_results

        errors = console(stderr=True)
        quiet_libraries(errors)
        logging.getLogger("lorank").setLevel(logging.ERROR)
        scenario = Scenario(where=where.value, sized=sized.value, **({} if steps is None else {"steps": steps}))
        chosen = list(METHODS) if methods == "all" else [name.strip() for name in methods.split(",") if name.strip()]
        try:
            reported, tuning = (
                [int(seed) for seed in text.split(",") if seed.strip()] for text in (seeds, tuning_seeds)
            )
        except ValueError as error:
            raise PlantedError(
                f"--seeds {seeds} --tuning-seeds {tuning_seeds}: expected whole numbers, separated by commas"
            ) from error
        if len(reported) > MOST_EXACT:
            require(f"lorank planted with more than {MOST_EXACT} seeds", "scipy")
        check_results(out, (TABLE, PICTURE), runs=RUNS)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=errors, transient=True, disable=not errors.is_terminal) as bar:
            task = bar.add_task("Students", total=None)

            def report(done: int, total: int, last: str) -> None:
                bar.update(task, completed=done, total=total, description=last)

            rows = run_study(
                scenario, chosen, out, seeds=reported, tuning_seeds=tuning, jobs=jobs, device=device, report=report
            )
        output = console()
        output.print(rich_table(rows, scenario))
        for written in write_results(rows, scenario, out):
            output.print(f"written to {written}", highlight=False, markup=False)
