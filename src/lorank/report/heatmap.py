"""Heat maps of ranks: blocks × projections, and attention heads × blocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from lorank.report.charts import CONTAINER, ChartLike, Width, data, thinned
from lorank.report.grid import Grid, grid_of
from lorank.report.numbers import Frame, RunNumbers

Shown = Literal["rank", "change"]
MOST_COLUMNS_WITH_NUMBERS = 16
MOST_FRAMES = 60
"""Frames in a chart with its own slider, whose data hold every one of them."""


def rank_chart(
    run: RunNumbers,
    shown: Shown = "change",
    *,
    width: Width = CONTAINER,
    title: Any = "",
    top: int | None = None,
    name: str | None = None,
) -> ChartLike:
    """The ranks at the end of a run, one cell per module.

    Args:
        run: the run.
        shown: what the colour and the number of a cell show: its rank; or its change from `run.reference`.
        width: in pixels.
        top: the end of the colour scale; None: the largest value at the end of the run.
        name: a name of the chart's data, which the page's code fills in; the chart itself has none then.
        title: a line above it, or Altair's `TitleParams`.
    """
    grid = grid_of(list(run.last.ranks))
    top = max(1, _highest(run.last, run.reference, shown)) if top is None else top
    return _cells(cell_rows(grid, run.last.ranks, run.reference), grid, shown, top, width, title, name=name)


def slider_chart(run: RunNumbers, shown: Shown = "rank", *, width: Width = 460) -> ChartLike:
    """The same with a slider over the allocations, for notebooks. In a file it shows the last allocation."""
    import altair as alt

    frames = thinned(run.frames, MOST_FRAMES)
    grid = grid_of(list(run.last.ranks))
    rows = [
        {**row, "frame": index, "step": frame.step}
        for index, frame in enumerate(frames)
        for row in cell_rows(grid, frame.ranks, run.reference)
    ]
    last = len(frames) - 1
    title = alt.TitleParams(
        f"{run.method}: {'ranks' if shown == 'rank' else f'change of ranks from {run.reference_name}'}",
        subtitle=f"{run.frames[0].total} ranks at step {run.frames[0].step}, {run.last.total} at step {run.last.step}",
    )
    if not last:
        return _cells(rows, grid, shown, highest(run, shown), width, title)
    slider = alt.param(
        name="allocation", value=last, bind=alt.binding_range(min=0, max=last, step=1, name="allocation ")
    )
    chart = _cells(rows, grid, shown, highest(run, shown), width, title)
    return chart.add_params(slider).transform_filter("datum.frame == allocation")


def head_chart(run: RunNumbers, projection: str, *, width: Width = CONTAINER, name: str | None = None) -> ChartLike:
    """The rank of every attention head of a projection at the end of a run, blocks × heads.

    Args:
        run: a run with ranks per head.
        projection: the projection, as `head_projections` names it.
        width: in pixels.
        name: see :func:`rank_chart`.
    """
    rows, grid = head_rows(run.last.heads, projection)
    top = max((max(ranks, default=0) for frame in run.frames for ranks in frame.heads.values()), default=1)
    return _cells(rows, grid, "rank", max(1, top), width, "", column_title="attention head", name=name)


def head_projections(run: RunNumbers) -> list[str]:
    """The projections with ranks per head, by their short names. One rank is no ranks per head."""
    heads = {name: ranks for name, ranks in run.last.heads.items() if len(ranks) > 1}
    if not heads:
        return []
    grid = grid_of(list(run.last.ranks))
    found = {grid.columns[grid.cells[name][1]] for name in heads if name in grid.cells}
    return [column for column in grid.columns if column in found]


def head_rows(heads: Mapping[str, Sequence[int]], projection: str) -> tuple[list[dict[str, Any]], Grid]:
    """The cells of :func:`head_chart`, and their grid."""
    whole = grid_of(list(heads))
    chosen = {
        whole.rows[row]: heads[name]
        for name, (row, column) in whole.cells.items()
        if whole.columns[column] == projection and len(heads[name]) > 1
    }
    columns = tuple(str(number) for number in range(max(map(len, chosen.values()), default=0)))
    names = {
        f"{block} {head}": (row, head)
        for row, (block, ranks) in enumerate(chosen.items())
        for head in range(len(ranks))
    }
    grid = Grid(tuple(chosen), columns, names)
    rows = [_cell(block, str(head), rank, rank) for block, some in chosen.items() for head, rank in enumerate(some)]
    return rows, grid


def row_height(grid: Grid) -> int:
    """Pixels of a row of a heat map."""
    return 28 if len(grid.rows) <= 16 else 20 if len(grid.rows) <= 40 else 13


def cell_rows(grid: Grid, ranks: Mapping[str, int], reference: Mapping[str, int]) -> list[dict[str, Any]]:
    """The rows of a chart's data, one per module."""
    return [
        _cell(grid.rows[row], grid.columns[column], ranks.get(name, 0), reference.get(name, 0), name)
        for name, (row, column) in grid.cells.items()
    ]


def highest(run: RunNumbers, shown: Shown) -> int:
    """The end of the colour scale, over all frames, so that a colour means the same in each. ≥ 1."""
    return max(1, *(_highest(frame, run.reference, shown) for frame in run.frames))


def _highest(frame: Frame, reference: Mapping[str, int], shown: Shown) -> int:
    base = reference if shown == "change" else {}
    return max((abs(rank - base.get(name, 0)) for name, rank in frame.ranks.items()), default=1)


def _cell(block: str, projection: str, rank: int, reference: int, module: str = "") -> dict[str, Any]:
    change = rank - reference
    return {
        "block": block,
        "projection": projection,
        "rank": rank,
        "change": change,
        "signed": f"{change:+d}".replace("-", "−") if change else "0",
        "module": module,
    }


def _cells(
    rows: Sequence[Mapping[str, Any]],
    grid: Grid,
    shown: Shown,
    top: int,
    width: Width,
    title: Any,
    column_title: str | None = None,
    name: str | None = None,
) -> ChartLike:
    import altair as alt

    height = row_height(grid)
    # most modules have few ranks and a few have many, so colours follow the root, or the logarithm
    if shown == "rank":
        scale = alt.Scale(type="sqrt", range="heatmap", domain=[0, top], interpolate="rgb")
        shade = f"sqrt(datum.rank / {top}) > 0.52"
    else:
        scale = alt.Scale(type="symlog", constant=2, range="diverging", domain=[-top, top], interpolate="rgb")
        shade = f"log(1 + abs(datum.change) / 2) / log(1 + {top} / 2) > 0.6"
    wide = len(grid.columns) > MOST_COLUMNS_WITH_NUMBERS
    base = alt.Chart(data([] if name else rows, name)).encode(
        x=alt.X("projection:N", sort=list(grid.columns), title=column_title).axis(
            labelAngle=0 if column_title else -40, orient="bottom", labelOverlap=bool(column_title), labelLimit=140
        ),
        y=alt.Y("block:N", sort=list(grid.rows), title="block").axis(labelOverlap=True, labelLimit=160),
        tooltip=[
            alt.Tooltip("module:N", title="module"),
            alt.Tooltip("rank:Q", title="rank"),
            alt.Tooltip("signed:N", title="change"),
        ],
    )
    layers: list[Any] = [
        base.mark_rect(style="cell").encode(
            color=alt.Color(f"{shown}:Q", scale=scale, title=shown).legend(
                orient="top", direction="horizontal", gradientLength=160, gradientThickness=8, tickMinStep=1
            )
        )
    ]
    if not wide and height >= 16:
        text = "rank:Q" if shown == "rank" else "signed:N"
        layers += [
            base.transform_filter(condition).mark_text(style=style, baseline="middle").encode(text=text)
            for condition, style in ((f"!({shade})", "on-low"), (shade, "on-high"))
        ]
    return alt.layer(*layers).properties(width=width, height=height * len(grid.rows), title=title)
