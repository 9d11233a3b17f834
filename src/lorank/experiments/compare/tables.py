"""What a comparison leaves in its folder: comparison.json, table.md and runs.parquet; and the table for a terminal."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from lorank.files import replacing_file, write_text

COMPARISON, TABLE, PARQUET = "comparison.json", "table.md", "runs.parquet"


def columns(result: Mapping[str, Any]) -> list[str]:
    """The head of the table."""
    metric = result["metric"].replace("_", " ")
    head = ["method", f"test {metric}", "− baseline", "95 %", "p", "k", "parameters", "lr", "seconds"]
    return [*head, "other text"] if _forgetting(result) else head


def cells(row: Mapping[str, Any]) -> list[str]:
    """One line of the table, as text."""
    difference = row["difference"]
    signed = ["", "", ""]
    if difference is not None:
        low, high = difference["low"], difference["high"]
        signed = [
            _number(difference["mean"], "+.3g"),
            "" if low is None else f"{low:+.3g} to {high:+.3g}",
            _number(difference["p"], ".2g"),
        ]
    error = "" if row["stderr"] is None else f" ± {row['stderr']:.2g}"
    return [
        row["title"] + (" *" if row["notes"] else ""),
        "failed" if row["mean"] is None else f"{row['mean']:.4f}{error}",
        *signed,
        _number(row["equivalent_k"], ".2g"),
        _number(row["parameters"], ",.0f"),
        f"{row['lr']:g}",
        _number(row["seconds"], ".0f"),
        *([] if row.get("other_loss") is None else [f"{row['other_loss'] - row['other_loss_before']:+.3f}"]),
    ]


def rich_tables(result: Mapping[str, Any]) -> list[Table]:
    """A table per budget that fits a terminal of 80 columns; table.md has more columns."""
    tables = []
    head = columns(result)
    for budget in result["budgets"]:
        table = Table(title=escape(f"{title(result)}: {budget}"), box=SIMPLE_HEAD)
        for place, name in enumerate([head[0], head[1], "− baseline (95 %)", *head[5:7]]):
            table.add_column(name, justify="right" if place else "left", no_wrap=True)
        for row in result["rows"]:
            if row["budget"] == budget:
                method, mean, difference, interval, _, *others = cells(row)
                together = f"{difference} ({interval})" if interval else difference
                style = (
                    "dim"
                    if row["reference"] is not None or not row["sized"]
                    else "bold"
                    if _is_better(row, result)
                    else None
                )
                table.add_row(*map(escape, [method, mean, together, *others[:2]]), style=style)
        tables.append(table)
    return tables


def sentences(result: Mapping[str, Any], budget: str) -> list[str]:
    """The sentences of the methods at a budget, and all notes."""
    rows = [row for row in result["rows"] if row["budget"] == budget]
    told = [row["sentence"] for row in rows if row["reference"] is None]
    return [*told, *(f"{row['title']} *: {note}." for row in rows for note in row["notes"])]


def title(result: Mapping[str, Any]) -> str:
    """What was compared, in a line."""
    return f"{result['name']} · {result['task']}"


def write_results(result: Mapping[str, Any], runs: Sequence[Mapping[str, Any]], out: Path) -> list[Path]:
    """Writes the three files, and returns them."""
    write_text(out / COMPARISON, json.dumps(result, indent=1) + "\n")
    write_text(out / TABLE, markdown(result))
    write_parquet(runs, out / PARQUET)
    return [out / COMPARISON, out / TABLE, out / PARQUET]


def markdown(result: Mapping[str, Any]) -> str:
    """The page with all tables and sentences."""
    lines = [f"# {title(result)}", "", result["sentence"], ""]
    head = columns(result)
    for budget in result["budgets"]:
        rows = [row for row in result["rows"] if row["budget"] == budget]
        lines += [f"## {budget}", "", _line(head), _line(["---", *["---:"] * (len(head) - 1)])]
        lines += [_line(cells(row)) for row in rows]
        lines += ["", *(f"- {told}" for told in sentences(result, budget)), ""]
    tuning, seeds = (", ".join(map(str, some)) for some in (result["tuning_seeds"], result["rows"][0]["seeds"]))
    lines += [
        f"Means over seeds {seeds} on test data; ± is the standard error. Intervals and p: paired bootstrap over seeds "
        f"and test examples. k: LoRA with k times the parameters is as good; LoRA × k is that LoRA. Rates were "
        f"chosen on seeds {tuning} by validation data:",
        "",
    ]
    if _forgetting(result):
        lines[-2] = (
            "Other text: the loss on another task, after training less before, which shows what is forgotten. "
            + lines[-2]
        )
    for row in result["rows"]:
        grid = "; ".join(f"{lr}: {_number(loss, '.4f') or 'failed'}" for lr, loss in row["lr_grid"].items())
        lines.append(f"- {row['title']}, {row['budget']}: {grid}")
    return "\n".join(lines) + "\n"


def write_parquet(runs: Sequence[Mapping[str, Any]], path: Path) -> None:
    """One row per run; ``ranks`` is a map from module to rank."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    names = list(dict.fromkeys(name for run in runs for name in run))
    data = {name: [run.get(name) for run in runs] for name in names}
    data["ranks"] = [None if ranks is None else list(ranks.items()) for ranks in data["ranks"]]
    arrays = {
        name: pa.array(data[name], pa.map_(pa.string(), pa.int32()) if name == "ranks" else None) for name in names
    }
    with replacing_file(path) as temporary:
        pq.write_table(pa.table(arrays), temporary)


def _forgetting(result: Mapping[str, Any]) -> bool:
    return any(row.get("other_loss") is not None for row in result["rows"])


def _is_better(row: Mapping[str, Any], result: Mapping[str, Any]) -> bool:
    difference = row["difference"]
    return bool(difference and difference["real"] and (difference["mean"] > 0) == result["higher_is_better"])


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _line(parts: Sequence[str]) -> str:
    return "| " + " | ".join(part.replace("|", "\\|") for part in parts) + " |"
