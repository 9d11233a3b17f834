"""The results of a sweep: table.csv with every run, table.md and a terminal table with every setting, a picture."""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from lorank.experiments.sweep import Finished, SweepResult
from lorank.files import write_text
from lorank.report.pareto import Point, pareto_front, pareto_picture

TABLE, CSV, PICTURE = "table.md", "table.csv", "pareto.png"
PARAMETERS, LOSS = "parameters", "validation loss"


def figures(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The metrics of one run that the tables show, measured at the end of the run."""
    return {
        LOSS: metrics["validation"]["loss_after"],
        **{f"test {name.replace('_', ' ')}": value for name, value in metrics["test"].items()},
        PARAMETERS: metrics["final"]["trainable_parameters"],
        "total rank": metrics["final"]["ranks"],
        "seconds": metrics["seconds"]["training"],
    }


def write_results(result: SweepResult, out: Path) -> list[Path]:
    """Writes table.csv, table.md and the picture into the sweep's folder; writes nothing if no run is finished.

    Returns:
        The files that were written. The picture is left out if every loss is NaN or infinite.
    """
    if not result.finished:
        return []
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / CSV, _csv(result.finished))
    head, rows = summary(result.finished)
    lines = [_markdown_row(head), _markdown_row(["---"] * len(head)), *map(_markdown_row, rows)]
    front = [point.label for point in pareto_front(points(result.finished))]
    notes = [
        "",
        f"Means over seeds, with standard deviations for several seeds. On the Pareto front of {PARAMETERS} and "
        f"{LOSS}: {'; '.join(front) or 'none'}.",
    ]
    notes += [f"- failed: {label}, seed {seed}: {message}" for label, seed, message in result.failures]
    write_text(out / TABLE, "\n".join([*lines, *notes]) + "\n")
    files = [out / TABLE, out / CSV]
    if any(math.isfinite(point.loss) for point in points(result.finished)):
        files.append(
            pareto_picture(points(result.finished), out / PICTURE, size="trainable parameters at the end", loss=LOSS)
        )
    return files


def summary(finished: Sequence[Finished]) -> tuple[list[str], list[list[str]]]:
    """The head and the rows of the table, one row per setting, as text."""
    groups = _groups(finished)
    keys = _in_order(key for run in finished for key in run.run.settings)
    columns = _in_order(name for run in finished for name in figures(run.metrics))
    head = [*keys, "seeds", *columns]
    rows = []
    for group in groups.values():
        settings = group[0].run.settings
        values = {name: [f[name] for run in group if name in (f := figures(run.metrics))] for name in columns}
        rows.append(
            [
                *(str(settings.get(key, "")) for key in keys),
                ", ".join(str(run.run.config.training.seed) for run in group),
                *(_mean(values[name]) for name in columns),
            ]
        )
    return head, rows


def rich_table(finished: Sequence[Finished], title: str) -> Table:
    """The same table for a terminal."""
    head, rows = summary(finished)
    table = Table(title=title)
    for number, name in enumerate(head):
        table.add_column(name, justify="left" if number == 0 else "right")
    for row in rows:
        table.add_row(*row)
    return table


def points(finished: Sequence[Finished]) -> list[Point]:
    """One point per setting: mean parameters, mean validation loss and its standard deviation over seeds."""
    made = []
    for label, group in _groups(finished).items():
        losses = [figures(run.metrics)[LOSS] for run in group]
        sizes = [figures(run.metrics)[PARAMETERS] for run in group]
        spread = statistics.stdev(losses) if len(losses) > 1 else 0.0
        made.append(Point(label, statistics.fmean(sizes), statistics.fmean(losses), spread))
    return made


def _groups(finished: Sequence[Finished]) -> dict[str, list[Finished]]:
    groups: dict[str, list[Finished]] = {}
    for run in finished:
        groups.setdefault(run.run.label, []).append(run)
    return groups


def _csv(finished: Sequence[Finished]) -> str:
    rows = [
        {
            **run.run.settings,
            "seed": run.run.config.training.seed,
            **figures(run.metrics),
            "folder": run.run.config.output_dir,
        }
        for run in finished
    ]
    file = io.StringIO()
    writer = csv.DictWriter(file, _in_order(key for row in rows for key in row), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def _mean(values: Sequence[float]) -> str:
    if not values:
        return ""
    mean = statistics.fmean(values)
    if all(float(value).is_integer() for value in values):
        return f"{mean:,.0f}"
    text = f"{mean:.0f}" if abs(mean) >= 1000 else f"{mean:.4g}"
    return f"{text} ± {statistics.stdev(values):.2g}" if len(values) > 1 else text


def _in_order(labels: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(labels))


def _markdown_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
