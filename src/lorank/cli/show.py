"""`lorank show`: what came out of a run, or what ranks an adapter has."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorank.cli.common import Json, console, json_output, one_message
from lorank.errors import LorankError

if TYPE_CHECKING:
    from rich.table import Table

    from lorank.training.summary import Summary

HISTORY, METRICS = "rank_history.jsonl", "metrics.json"
MODULES = 20
"""The number of modules that the table lists, of those that changed most."""
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


def show(
    run: Annotated[
        Path,
        typer.Argument(
            metavar="RUN",
            help="The folder of a run (of `lorank train`, a Trainer, or lorank.attach with history_path), a history "
            "file, a checkpoint, or the folder of any PEFT LoRA adapter.",
        ),
    ],
    every: Annotated[bool, typer.Option("--all", help="List every module, also those that did not change.")] = False,
    as_json: Json = False,
) -> None:
    """Say what came out of a run: what moved, where to, what it cost; then every projection and module.

    Of an adapter without a history, say where its ranks are.

    Examples:

    `lorank show runs/e2e_alora`

    `lorank show outputs/checkpoint-200`

    `lorank show my/adapter --json`
    """
    with one_message(), json_output(as_json) as write_json:
        history, adapter = _find(run)
        if history is None:
            _show_adapter(adapter, every=every, write_json=write_json if as_json else None)
            return
        summary = _summary(history, _last_step(run))
        if as_json:
            write_json(summary.data)
            return
        output = console(soft_wrap=True)
        output.print(str(summary), highlight=False, markup=False)
        tables = console()
        tables.print(_table("projection", summary.data["projections"], _sizes(summary.data)))
        modules = summary.data["modules"]
        changed = sorted(modules, key=lambda name: -abs(modules[name]["rank"] - modules[name]["made"]))
        kept = changed if every else [name for name in changed if _touched(modules[name])][:MODULES]
        if kept:
            tables.print(_table("module", {name: modules[name] for name in kept}))
        if len(kept) < len(modules):
            tables.print(f"{len(modules) - len(kept)} more modules: --all", highlight=False)


def _find(run: Path) -> tuple[Path | None, Path]:
    """(the history of a run or None, the folder of its adapter).

    Raises:
        LorankError: there is neither a history nor an adapter.
    """
    if run.is_file():
        return run, run.parent
    if not run.is_dir():
        raise LorankError(f"{run}: there is no such file or folder. Give the folder of a run or of an adapter")
    # an adapter inside a run's folder, or a Trainer's checkpoint, has its history beside it
    inside = run.name == "adapter" or _CHECKPOINT.fullmatch(run.name)
    for folder in (run, run.resolve().parent) if inside else (run,):
        if (folder / HISTORY).is_file():
            return folder / HISTORY, run
    if (run / "adapter_config.json").is_file():
        return None, run
    raise LorankError(
        f"{run} has no {HISTORY} and no adapter_config.json. Give the folder of a run (output_dir), its history file, "
        "or the folder of an adapter"
    )


def _last_step(run: Path) -> int | None:
    """The step of the ranks that are shown, if it may not be the last one: of a checkpoint, or of the best one."""
    if found := _CHECKPOINT.fullmatch(run.name):
        return int(found[1])
    folder = run if (run / METRICS).is_file() else run.resolve().parent
    try:
        best = json.loads((folder / METRICS).read_text(encoding="utf-8")).get("best_step")
    except (OSError, ValueError, AttributeError):
        return None
    return best if isinstance(best, int) else None


def _summary(history: Path, last_step: int | None) -> Summary:
    from lorank.training import read_history
    from lorank.training.summary import summarise

    records = read_history(history)
    if last_step is None or not records:
        return summarise(records)
    return summarise(records, [record for record in records if record.step <= last_step or record is records[0]][-1])


def _show_adapter(adapter: Path, *, every: bool, write_json: Callable[[Any], None] | None) -> None:
    from lorank.lora import open_standalone
    from lorank.training.summary import by_projection, projections

    layers = open_standalone(adapter).layers
    ranks = layers.ranks
    sums = by_projection({name: {"rank": rank} for name, rank in ranks.items()})
    if write_json is not None:
        write_json(
            {
                "adapter": str(adapter),
                "ranks": layers.total_rank,
                "parameters": layers.parameters,
                "modules": ranks,
                "projections": {name: own["rank"] for name, own in sums.items()},
            }
        )
        return
    from rich.table import Table

    output = console(soft_wrap=True)
    output.print(
        f"{adapter}: {layers.total_rank:,} ranks, {layers.parameters:,} parameters in {len(ranks)} modules, the "
        f"highest rank {max(ranks.values())}; no {HISTORY}, so nothing is known about how they came there",
        highlight=False,
        markup=False,
    )
    table = Table()
    for column in ("projection", "modules", "ranks", "of a module"):
        table.add_column(column, justify="left" if column == "projection" else "right")
    of = projections(list(ranks))
    for projection, own in sums.items():
        values = [rank for name, rank in ranks.items() if of[name] == projection]
        table.add_row(projection, str(len(values)), str(own["rank"]), _span(values))
    console().print(table)
    if every:
        modules = Table("module")
        modules.add_column("rank", justify="right")
        for name, rank in ranks.items():
            modules.add_row(name, str(rank))
        console().print(modules)


def _table(what: str, rows: Mapping[str, Mapping[str, int]], sizes: Mapping[str, list[int]] | None = None) -> Table:
    from rich.table import Table

    table = Table()
    table.add_column(what, overflow="fold")
    for column in (*(("modules",) if sizes else ()), "as made", "now", "change", "pruned", "added"):
        table.add_column(column, justify="right")
    if sizes:
        table.add_column("of a module", justify="right")
    for name, own in rows.items():
        difference = own["rank"] - own["made"]
        cells = [str(own["made"]), str(own["rank"]), f"{difference:+d}".replace("-", "−") if difference else ""]
        cells += [str(own[key] or "") for key in ("pruned", "added")]
        table.add_row(name, *([str(len(sizes[name])), *cells, _span(sizes[name])] if sizes else cells))
    return table


def _sizes(data: Mapping[str, Any]) -> dict[str, list[int]]:
    """Per projection, the present ranks of its modules."""
    from lorank.training.summary import projections

    found: dict[str, list[int]] = {}
    for name, projection in projections(list(data["modules"])).items():
        found.setdefault(projection, []).append(data["modules"][name]["rank"])
    return found


def _span(ranks: list[int]) -> str:
    low, high = min(ranks), max(ranks)
    return str(low) if low == high else f"{low} to {high}"


def _touched(own: Mapping[str, int]) -> bool:
    return own["rank"] != own["made"] or bool(own["pruned"] or own["added"])
