"""The results of a sweep as files: a table of settings, every run as CSV and JSON lines, a picture; and as JSON."""

from __future__ import annotations

import csv
import io
import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from lorank.experiments.sweep.results import OBJECTIVES, PARAMETERS, Finished, SweepResult, plain
from lorank.files import write_text
from lorank.report.pareto import pareto_picture

TABLE, CSV, LINES, PICTURE, MARKER = "table.md", "table.csv", "results.jsonl", "pareto.png", "sweep_study.json"
"""The files; the last one marks the folder of a sweep."""


def write_results(result: SweepResult, out: Path) -> list[Path]:
    """Writes the table, every run as CSV and as JSON lines, and the picture into the sweep's folder; writes nothing if
    no trial is finished.

    Returns:
        The files that were written. The picture is left out if every loss is NaN or infinite.
    """
    if not result.finished:
        return []
    out.mkdir(parents=True, exist_ok=True)
    rows = _rows(result.finished)
    write_text(out / LINES, "".join(json.dumps(row) + "\n" for row in rows))
    write_text(out / CSV, _csv(rows))
    head, lines = summary(result.finished)
    text = [_markdown_row(head), _markdown_row(["---"] * len(head)), *map(_markdown_row, lines)]
    notes = ["", "Means over seeds, with standard deviations for several seeds.", f"{conclusion(result)}."]
    notes += [f"- stopped early: {label}" for label in result.pruned]
    notes += [f"- failed: {label}: {message}" for label, message in result.failures]
    write_text(out / TABLE, "\n".join([*text, *notes]) + "\n")
    files = [out / TABLE, out / CSV, out / LINES]
    points = result.points()
    if any(math.isfinite(point.loss) and math.isfinite(point.size) for point in points):
        first, second = result.axes
        several = len(result.finished[0].runs) > 1
        picture = pareto_picture(
            points,
            out / PICTURE,
            size="trainable parameters at the end" if second == PARAMETERS else second,
            loss=f"{first}, mean and standard deviation over seeds" if several else first,
            title=f"{result.sweep.name}: {first} against {second}, {_count(len(points), 'setting')}",
        )
        files.append(picture)
    return files


def conclusion(result: SweepResult) -> str:
    """The best setting in words; with two objectives, the Pareto front."""
    first, second = result.axes
    if result.best is None:
        return f"No trial has a finite {first}"
    if len(result.sweep.file.objectives) == 1:
        best, name = result.best, OBJECTIVES[result.sweep.file.objectives[0]]
        return f"Lowest {name}: {_number(best.mean(name))} with {best.label} ({best.mean(PARAMETERS):,.0f} parameters)"
    return f"Pareto front of {second} and {first}: " + "; ".join(
        f"{trial.label} ({_number(trial.mean(second))}, {_number(trial.mean(first))})" for trial in result.front
    )


def summary(finished: Sequence[Finished]) -> tuple[list[str], list[list[str]]]:
    """The head and the rows of the table, one row per setting, as text."""
    keys = _in_order(key for trial in finished for key in trial.settings)
    columns = _in_order(name for trial in finished for run in trial.runs for name in run.figures)
    head = [*keys, "seeds", *columns]
    rows = [
        [
            *(_cell(trial.settings.get(key, "")) for key in keys),
            ", ".join(str(run.seed) for run in trial.runs),
            *(_mean([run.figures[name] for run in trial.runs if name in run.figures]) for name in columns),
        ]
        for trial in finished
    ]
    return head, rows


def rich_table(finished: Sequence[Finished], title: str) -> Table:
    """The same table for a terminal."""
    head, rows = summary(finished)
    table = Table(title=title)
    for number, name in enumerate(head):
        table.add_column(escape(name), justify="left" if number == 0 else "right")
    for row in rows:
        table.add_row(*map(escape, row))
    return table


def as_json(result: SweepResult, study: str, url: str, files: Sequence[Path]) -> dict[str, Any]:
    """The result for scripts."""

    def one(trial: Finished) -> dict[str, Any]:
        names = _in_order(name for run in trial.runs for name in run.figures)
        return {
            "trial": trial.number,
            "settings": dict(trial.settings),
            "seeds": [run.seed for run in trial.runs],
            "folders": [run.folder for run in trial.runs],
            "means": {name.replace(" ", "_"): plain(trial.mean(name)) for name in names},
        }

    return {
        "study": study,
        "storage": url,
        "output_dir": str(result.sweep.out),
        "sampler": result.sweep.file.sampler,
        "objectives": list(result.sweep.file.objectives),
        "trials": {
            "asked": result.sweep.count,
            "finished": len(result.finished),
            "new": result.new,
            "stopped_early": len(result.pruned),
            "failed": len(result.failures),
            "unfinished": result.unfinished,
        },
        "best": one(result.best) if result.best else None,
        "pareto_front": [one(trial) for trial in result.front],
        "results": [one(trial) for trial in result.finished],
        "failures": [{"settings": label, "error": message} for label, message in result.failures],
        "files": [str(file) for file in files],
    }


def _rows(finished: Sequence[Finished]) -> list[dict[str, Any]]:
    return [
        {
            "trial": trial.number,
            **trial.settings,
            "seed": run.seed,
            **{name: plain(value) for name, value in run.figures.items()},
            "folder": run.folder,
        }
        for trial in finished
        for run in trial.runs
    ]


def _csv(rows: Sequence[Mapping[str, Any]]) -> str:
    file = io.StringIO()
    writer = csv.DictWriter(file, _in_order(key for row in rows for key in row), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _mean(values: Sequence[float]) -> str:
    if not values:
        return ""
    mean = statistics.fmean(values)
    if all(float(value).is_integer() for value in values):
        return f"{mean:,.0f}"
    text = f"{mean:.0f}" if abs(mean) >= 1000 else f"{mean:.4g}"
    return f"{text} ± {statistics.stdev(values):.2g}" if len(values) > 1 else text


def _number(value: float) -> str:
    return f"{value:,.0f}" if value.is_integer() or abs(value) >= 1000 else f"{value:.4f}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' if number != 1 else ''}"


def _in_order(labels: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(labels))


def _markdown_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
