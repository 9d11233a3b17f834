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
    methods: Annotated[str | None, typer.Option(help="Methods, separated by commas, or all. [default: all]")] = None,
    seeds: Annotated[
        str | None, typer.Option(help="Seeds of the reported runs, separated by commas. [default: 0,1,2,3,4]")
    ] = None,
    tuning_seeds: Annotated[
        str | None, typer.Option(help="Seeds for choosing learning rates, separated by commas. [default: 100,101]")
    ] = None,
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
    quick: Annotated[
        bool,
        typer.Option(
            "--quick",
            help="A first look in minutes: uniform, true ranks and two methods, 400 steps, one tuning seed, two seeds.",
        ),
    ] = False,
) -> None:
    """Plant updates of known ranks in the tiny Llama, and measure which method finds the modules that have them.

    Every method has a budget of as many ranks as were planted. All methods have the same number of steps and of
    settings to tune; tuning uses separate seeds. Uniform, random and true ranks are run for comparison. Runs offline.
    With all methods, seeds and steps it takes hours; it says how many once the first run is finished. After an
    interruption, the same command continues and keeps finished runs. Writes runs.jsonl, table.md and gap.png.

    Examples:

    `lorank planted --quick`

    `lorank planted --methods uniform,oracle,random,alora --out runs/planted`

    `lorank planted --where heads --out runs/planted_heads --jobs 2`
    """
    with one_message(interrupted="The same command continues: finished runs are kept."):
        require("lorank planted", "matplotlib")
        from lorank.cli.study_progress import StudyProgress
        from lorank.experiments.folder import check_results
        from lorank.experiments.planted.methods import METHODS
        from lorank.experiments.planted.metrics import MOST_EXACT
        from lorank.experiments.planted.problem import Scenario
        from lorank.experiments.planted.study import RUNS, PlantedError, run_study
        from lorank.experiments.planted.table import PICTURE, TABLE, rich_table, write_results

        errors = console(stderr=True)
        quiet_libraries(errors)
        logging.getLogger("lorank").setLevel(logging.ERROR)
        if quick:
            out = out / "quick"
            methods, steps = methods or "uniform,oracle,balanced,ard", steps or 400
            seeds, tuning_seeds = seeds or "0,1", tuning_seeds or "100"
            errors.print("[yellow]A quick look, not a result:[/] fewer methods, seeds and steps.", highlight=False)
        methods, seeds, tuning_seeds = methods or "all", seeds or "0,1,2,3,4", tuning_seeds or "100,101"
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
        with StudyProgress(errors) as progress:
            rows = run_study(
                scenario, chosen, out, seeds=reported, tuning_seeds=tuning, jobs=jobs, device=device, report=progress
            )
        output = console()
        output.print(rich_table(rows, scenario, quick=quick))
        for written in write_results(rows, scenario, out, quick=quick):
            output.print(f"written to {written}", highlight=False, markup=False)
