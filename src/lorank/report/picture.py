"""`ranks.png`: what moved where, the losses and the parameters, in one picture for a run or for several."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lorank.extras import require
from lorank.report.charts import ChartLike, write_chart
from lorank.report.comparison import compare_runs, size_chart
from lorank.report.grid import grid_of
from lorank.report.heatmap import rank_chart, row_height
from lorank.report.numbers import RunNumbers
from lorank.report.steps import loss_chart
from lorank.report.steps import size_chart as size_over_steps

CELL = 44
"""Pixels of a column of a heat map."""
SIDE_BY_SIDE = 340
"""A heat map of fewer pixels has the other charts beside it in one row; a taller one, above each other."""


def ranks_picture(runs: Sequence[RunNumbers], path: str | Path, *, title: str = "") -> Path:
    """Writes a PNG or SVG.

    One run: the change of every module's rank, beside losses and parameters over the steps. Several: the changes of
    each run that moved ranks, beside the losses of all over their parameters.

    Args:
        runs: at least one. Several are of one task.
        path: the file to write.
        title: a line above the picture.

    Returns:
        The file's path.

    Raises:
        MissingPackageError: altair or vl-convert-python is not installed.
    """
    require("ranks_picture", "altair", "vl_convert")
    import altair as alt

    shown = _of_one(runs[0]) if len(runs) == 1 else _of_several(runs)
    # every panel keeps its own scale of colours; the numbers in the cells say what a colour means
    chart = alt.hconcat(*shown, spacing=40).resolve_scale(color="independent")
    if title:
        chart = chart.properties(title=alt.TitleParams(title, fontSize=16, offset=18))
    return write_chart(chart, path)


def _of_one(run: RunNumbers) -> list[ChartLike]:
    import altair as alt

    height = row_height(grid_of(list(run.last.ranks))) * len(grid_of(list(run.last.ranks)).rows)
    beside = height < SIDE_BY_SIDE
    tall = min(max(height, 170), 520)
    height = tall if beside else int(0.42 * tall)
    charts = [size_over_steps(run, width=330, title="parameters over steps", height=height)]
    if run.losses or run.validation:
        height = tall if beside else int(0.5 * tall)
        charts.insert(0, loss_chart(run, width=330, title="loss over steps; marked: ranks move", height=height))
    return [_map(run), *(charts if beside else [alt.vconcat(*charts).resolve_scale(color="independent")])]


def _of_several(runs: Sequence[RunNumbers]) -> list[ChartLike]:
    charts = [_map(run) for run in runs if any(run.changes.values())]
    compared = compare_runs(runs)
    if compared:
        charts.append(size_chart(compared[0], width=340, height=240, title=f"{compared[0].metric} and size"))
    return charts or [_map(runs[0])]


def _map(run: RunNumbers) -> ChartLike:
    import altair as alt

    changed = any(run.changes.values())
    width = CELL * max(5, len(grid_of(list(run.last.ranks)).columns))
    total = f"{run.last.total:,} ranks" + (f", {run.last.parameters:,} LoRA parameters" if run.last.parameters else "")
    lines = [f"counted from {run.reference_name}" if changed else "no rank has moved", total]
    if run.quality is not None:
        lines.append(f"{run.quality.metric} {run.quality.value:.4f}")
    title = alt.TitleParams(f"{run.method}: {'ranks gained and lost' if changed else 'ranks'}", subtitle=lines)
    return rank_chart(run, "change" if changed else "rank", width=width, title=title)
