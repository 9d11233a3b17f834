"""`lorank resize`: other ranks for any adapter, without data and without its base model."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lorank.cli.common import Json, console, json_output, one_message, quiet_libraries
from lorank.experiments.adapter_folder import check_adapter, check_one_size, check_pruned_folder

if TYPE_CHECKING:
    from rich.table import Table

    from lorank.experiments.resize import Resized


def resize(
    adapter: Annotated[
        Path,
        typer.Argument(
            metavar="ADAPTER",
            help="The folder of any PEFT LoRA adapter (with adapter_config.json), or the output_dir of `lorank train`.",
        ),
    ],
    out: Annotated[Path, typer.Option(help="The folder for the new adapter.")],
    rank: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="The rank of every module. Modules above it receive the best approximation of their update; modules "
            "below it grow by ranks that change nothing, as servers with one rank for all modules need.",
        ),
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            help="The size of the whole adapter: '50% of adapter' (of this adapter's parameters; also 50%), 8 (ranks "
            "per module on average), '120 ranks', 2M (parameters) or 8MB (file size). The largest parts of all updates "
            "stay."
        ),
    ] = None,
    max_lora_rank: Annotated[
        int | None,
        typer.Option(min=1, help="The highest rank of any module, with --budget or alone. Nothing grows above it."),
    ] = None,
    energy: Annotated[
        float | None,
        typer.Option(help="Every module receives the lowest rank that holds this share of its ‖BA‖²: 0.95."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the adapter in --out.")] = False,
    as_json: Json = False,
) -> None:
    """Change the ranks of a trained adapter by the singular values of its updates. Needs no data and no base model.

    The new adapter is plain PEFT. The original adapter is not changed. With data, `lorank prune` loses less.

    Examples:

    `lorank resize my/adapter --rank 8 --out rank8`

    `lorank resize my/adapter --budget 50% --out half`

    `lorank resize my/adapter --energy 0.95 --out smaller`

    `lorank resize my/adapter --rank 32 --out for_server`
    """
    with one_message(), json_output(as_json) as write_json:
        check_adapter(adapter)
        check_one_size(rank, budget, max_lora_rank, energy)
        check_pruned_folder(adapter, out, overwrite=overwrite)
        from lorank.experiments.resize import resize as run

        quiet_libraries(console(stderr=True))
        resized = run(
            adapter, out, rank=rank, budget=budget, max_lora_rank=max_lora_rank, energy=energy, overwrite=overwrite
        )
        if as_json:
            write_json({"adapter": adapter, **asdict(resized)})
        else:
            console().print(_table(adapter, resized))


def _table(adapter: Path, resized: Resized) -> Table:
    from rich.markup import escape
    from rich.table import Table

    before, after = ([pair[side] for pair in resized.ranks.values()] for side in (0, 1))
    table = Table(show_header=False)
    table.add_row("adapter", escape(str(adapter)))
    table.add_row("total rank", f"{sum(before)} → {sum(after)}")
    table.add_row("modules with ranks", f"{sum(map(bool, before))} → {sum(map(bool, after))}")
    table.add_row("highest rank", f"{max(before)} → {max(after)}")
    share = 100 * resized.parameters[1] / resized.parameters[0]
    table.add_row("parameters", f"{resized.parameters[0]:,} → {resized.parameters[1]:,} ({share:.1f} % of adapter)")
    table.add_row("share of ‖BA‖² kept", f"{100 * resized.energy:.2f} %")
    table.add_row("largest change of a module", f"{round(100 * resized.change, 6):.3g} % of ‖BA‖")
    table.add_row("written to", escape(str(resized.folder)))
    return table
