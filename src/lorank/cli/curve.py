"""`lorank curve`: which rank do I need? The predicted loss for every budget, from one wide adapter."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lorank.cli.adapter_options import Data, Kind, Model, progress_bar
from lorank.cli.common import Json, console, json_output, one_message, quiet_libraries
from lorank.experiments.adapter_folder import adapter_of_run, check_adapter
from lorank.experiments.errors import SettingsError
from lorank.extras import require

if TYPE_CHECKING:
    from rich.table import Table

    from lorank.experiments.curve import Measured


def curve(
    source: Annotated[
        str,
        typer.Argument(
            metavar="ADAPTER|RECIPE",
            help="The folder of a finished adapter or run; or a recipe, of which a wide run is made first.",
        ),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Further settings, as for `lorank train`: task.max_length=64."),
    ] = None,
    data: Data = None,
    task: Kind = None,
    model: Model = None,
    config: Annotated[
        Path | None, typer.Option(help="A configuration of `lorank train`, for model and task of an adapter.")
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Number of validation examples to measure on.")] = 64,
    at: Annotated[
        str | None,
        typer.Option(
            help="Print the LoraConfig of this point instead of the table: knee, 50% (of the measured adapter), or a "
            "budget such as 8, '120 ranks', 2M."
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="A folder for curve.json and curve.png. [default for a recipe: its output_dir and _curve]"),
    ] = None,
    rank: Annotated[
        int | None, typer.Option(min=2, help="Recipes only: the rank of the wide run. [default: 16]")
    ] = None,
    fraction: Annotated[
        float | None,
        typer.Option(help="Recipes only: the part of the recipe's steps. A part shows too few ranks. [default: 1]"),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the curve, and the run, in --out.")] = False,
    as_json: Json = False,
) -> None:
    """Which rank do I need? Predict the loss for every budget, from one wide adapter and a few batches.

    The prediction is the present loss and half of the worth (σ²) of the ranks that a budget leaves out. It orders
    budgets; docs/posthoc.md shows it beside adapters that were cut, and that were trained at each size. The knee is
    where doubling the parameters begins to pay less than on the average of the curve.

    Examples:

    `lorank curve runs/e2e_lora --out curve`

    `lorank curve my/adapter --data e2e_nlg --at 50%`

    `lorank curve e2e_lora --rank 16`
    """
    with one_message(), json_output(as_json) as write_json:
        if out is not None or not _is_adapter(source):
            require("lorank curve --out", "altair", "vl_convert")
        folder = Path(source) if _is_adapter(source) else None
        if folder is not None and (rank is not None or fraction is not None):
            raise SettingsError("--rank and --fraction are for the run of a recipe; an adapter is measured as it is")
        if folder is None:
            _check_recipe(source, data, task, model, config)
        from lorank.experiments import curve as curves

        progress = console(stderr=True)  # one: log lines must not break the view of a run
        quiet_libraries(progress)
        steps = None
        if folder is not None:
            if out is not None:
                curves.check_files(out, overwrite=overwrite)
            from lorank.experiments.adapter_session import load_finished

            loaded = load_finished(folder, data=data, task=task, model=model, config=config, overrides=overrides or ())
        else:
            out = out if out is not None else _default_out(source, overrides or [])
            curves.check_files(out, overwrite=overwrite)
            loaded, steps = curves.wide_run(
                source,
                overrides or [],
                out / curves.RUN,
                rank=16 if rank is None else rank,
                fraction=1.0 if fraction is None else fraction,
                overwrite=overwrite,
                console=progress,
            )
        with progress_bar("Measuring") as report:
            measured = curves.measure(loaded, samples=samples, progress=report)
        if steps is not None:
            from dataclasses import replace

            measured = replace(measured, steps=steps)
        chosen = None if at is None else measured.curve.lora_config(at)
        if out is not None:
            curves.write(measured, out)
        if chosen is not None:  # it is JSON in any case
            write_json(chosen)
        elif as_json:
            write_json(curves.as_json(measured))
        else:
            console().print(_table(measured))
            if out is not None:
                console().print(f"written to {out}", markup=False)


def _is_adapter(source: str) -> bool:
    """Whether a folder is meant. A recipe is a file, or a name without a folder."""
    if Path(source).is_dir():
        check_adapter(Path(source))
        return (adapter_of_run(Path(source)) / "adapter_config.json").is_file()
    return False


def _check_recipe(source: str, data: str | None, task: str | None, model: str | None, config: Path | None) -> None:
    from lorank.config.recipes import find_file

    find_file(source)
    given = {"--data": data, "--task": task, "--model": model, "--config": config}
    for option, value in given.items():
        if value is not None:
            raise SettingsError(f"{option} is for adapters; change a recipe by settings such as task.data=…")


def _default_out(source: str, overrides: list[str]) -> Path:
    from lorank.config.settings import load_config

    own = Path(load_config(source, overrides).output_dir)
    return own.with_name(f"{own.name}_curve")


def _table(measured: Measured) -> Table:
    from rich.markup import escape
    from rich.table import Table

    curve = measured.curve
    wide = "" if measured.steps is None else f", trained for {measured.steps} steps"
    table = Table(
        title=f"Rank curve of {escape(str(measured.adapter))}{wide}, on {measured.samples} examples of "
        f"{escape(measured.data)}: predicted loss"
    )
    for column in ("of adapter", "parameters", "ranks", "modules", "highest rank", "loss", "increase", ""):
        table.add_column(column, justify="right")
    for point in sorted(curve.points, key=lambda one: -one.parameters):
        ranks = [rank for rank in point.ranks.values() if rank]
        table.add_row(
            f"{100 * point.share:.3g} %",
            f"{point.parameters:,}",
            str(sum(ranks)),
            str(len(ranks)),
            str(max(ranks)),
            f"{point.loss:.4f}",
            f"{point.loss - curve.loss:.4f}",
            "knee" if point is curve.knee else "",
        )
    return table
