"""`lorank merge`: one adapter for several, of any ranks."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lorank.cli.adapter_options import progress_bar
from lorank.cli.common import Json, console, json_output, one_message, quiet_libraries
from lorank.experiments.adapter_folder import (
    adapter_of_run,
    check_adapter,
    check_choice,
    check_pruned_folder,
    check_weights,
)
from lorank.experiments.errors import SettingsError

if TYPE_CHECKING:
    from rich.table import Table

    from lorank.experiments.merge import Merged


def merge(
    adapters: Annotated[
        list[Path],
        typer.Argument(
            metavar="ADAPTER ADAPTER …",
            help="Two or more folders of PEFT LoRA adapters of one base model, or output_dirs of `lorank train`.",
        ),
    ],
    out: Annotated[Path, typer.Option(help="The folder for the merged adapter.")],
    weights: Annotated[
        str | None,
        typer.Option(help="A number for each adapter, in their order: 1,0.5. [default: 1 / n each, the mean]"),
    ] = None,
    rank: Annotated[int | None, typer.Option(min=1, help="The highest rank of any module of the result.")] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            help="The size of the result: 50% (of the sum), 8 (ranks per module on average), '120 ranks', 2M "
            "(parameters) or 8MB (file size)."
        ),
    ] = None,
    by: Annotated[
        str | None,
        typer.Option(
            help="How ranks are chosen: balanced (by their effect on the losses of all tasks) or svd (by size; without "
            "data). [default: balanced for adapters of lorank train, or with --config]"
        ),
    ] = None,
    config: Annotated[
        list[Path] | None,
        typer.Option(help="For balanced, a configuration of `lorank train` with data. Once for each task."),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="For balanced, the number of examples of each task.")] = 32,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the adapter in --out.")] = False,
    as_json: Json = False,
) -> None:
    """Merge adapters of one base model: the weighted sum of their updates, cut to a size.

    Without --rank and --budget, the result is the sum itself, with all ranks of all adapters. The adapters may have any
    ranks and modules. The originals stay as they are.

    Examples:

    `lorank merge runs/manual runs/e2e --weights 1,1 --budget 50% --out both`

    `lorank merge my/adapter other/adapter --rank 16 --out both`
    """
    with one_message(), json_output(as_json) as write_json:
        numbers = _check(adapters, out, weights, by, overwrite=overwrite)
        from lorank.experiments.merge import merge as run

        quiet_libraries(console(stderr=True))
        with progress_bar("Measuring") as report:
            merged = run(
                adapters,
                out,
                weights=numbers,
                rank=rank,
                budget=budget,
                by=by,
                configs=config or (),
                samples=samples,
                overwrite=overwrite,
                progress=report,
            )
        if as_json:
            write_json({"adapters": [str(adapter) for adapter in adapters], **asdict(merged)})
        else:
            console().print(_table(adapters, merged))


def _check(adapters: list[Path], out: Path, weights: str | None, by: str | None, *, overwrite: bool) -> list[float]:
    for adapter in adapters:
        check_adapter(adapter)
        check_pruned_folder(adapter_of_run(adapter), out, overwrite=overwrite)
    if by is not None:
        check_choice("--by", by, ("balanced", "svd"))
    try:
        numbers = None if weights is None else [float(part) for part in weights.split(",")]
    except ValueError as error:
        raise SettingsError(f"--weights {weights!r}: expected numbers with commas between them: 1,0.5") from error
    return check_weights(adapters, numbers)


def _table(adapters: list[Path], merged: Merged) -> Table:
    from rich.markup import escape
    from rich.table import Table

    before, after = ([pair[side] for pair in merged.ranks.values()] for side in (0, 1))
    table = Table(show_header=False)
    for adapter, weight in zip(adapters, merged.weights, strict=True):
        table.add_row("adapter", f"{weight:g} × {escape(str(adapter))}")
    table.add_row("cut by", merged.by or "nothing: this is the whole sum")
    table.add_row("total rank", f"{sum(before)} → {sum(after)}")
    table.add_row("highest rank", f"{max(before)} → {max(after)}")
    share = 100 * merged.parameters[1] / merged.parameters[0]
    table.add_row("parameters", f"{merged.parameters[0]:,} → {merged.parameters[1]:,} ({share:.1f} % of the sum)")
    table.add_row("share of ‖ΔW‖² kept", f"{100 * merged.energy:.2f} %")
    for one in merged.losses:
        table.add_row(
            f"validation loss, {escape(one.task)}", f"{one.whole:.4f} → {one.merged:.4f} ({one.examples} examples)"
        )
    table.add_row("written to", escape(str(merged.folder)))
    return table
