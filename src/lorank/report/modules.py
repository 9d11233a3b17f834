"""Module by module: which gained and lost ranks, and what the ranks of each projection are worth."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

from lorank.report.charts import CONTAINER, ChartLike, Width, data, thinned
from lorank.report.grid import grid_of
from lorank.report.numbers import RunNumbers, Worth

MOST_BARS = 10
"""Modules that gained, and modules that lost, in a picture."""
SIDES: tuple[tuple[str, Literal["left", "right"], int], ...] = ((">", "left", 4), ("<", "right", -4))
MOST_TICKS = 5000
WIDE = 100.0
"""If the largest score is more than this multiple of the median, the scale is logarithmic."""


def change_chart(run: RunNumbers, *, width: Width = CONTAINER, title: Any = "") -> ChartLike:
    """Bars: the modules that gained and lost most, compared with `run.reference`. At least one module has changed."""
    import altair as alt

    rows: list[dict[str, Any]] = [
        {
            "module": label,
            "name": name,
            "change": change,
            "signed": f"{change:+d}".replace("-", "−"),
            "side": "gained" if change > 0 else "lost",
            "from": run.reference.get(name, 0),
            "to": run.last.ranks[name],
        }
        for name, label, change in most_changed(run)
    ]
    changes = [row["change"] for row in rows]
    room = 0.12 * (max(0, *changes) - min(0, *changes))  # for the numbers at the ends of the bars
    ends = [min(0, *changes) - room * (min(changes) < 0), max(0, *changes) + room * (max(changes) > 0)]
    base = alt.Chart(data(rows)).encode(
        y=alt.Y("module:N", sort=[row["module"] for row in rows], title=None).axis(
            labelLimit=150, ticks=False, domain=False
        ),
        x=alt.X("change:Q", scale=alt.Scale(domain=ends, nice=False), title="ranks gained or lost").axis(
            tickMinStep=1, tickCount=6, format="d"
        ),
        tooltip=[alt.Tooltip("name:N", title="module"), "from:Q", "to:Q"],
    )
    bars = base.mark_bar(height={"band": 0.72}).encode(
        color=alt.Color("side:N", legend=None, scale=alt.Scale(domain=["gained", "lost"], range="category"))
    )
    texts = [
        base.transform_filter(f"datum.change {sign} 0")
        .mark_text(style="label", align=align, dx=offset)
        .encode(text="signed:N")
        for sign, align, offset in SIDES
    ]
    zero = alt.Chart(data([{"change": 0}])).mark_rule(style="zero").encode(x="change:Q")
    return alt.layer(bars, zero, *texts).properties(width=width, height=20 * len(rows), title=title)


def most_changed(run: RunNumbers, most: int = MOST_BARS) -> list[tuple[str, str, int]]:
    """(module, its short name, change): at most ``most`` that gained, then as many that lost, by change."""
    short = short_names(run)
    changes = sorted(run.changes.items(), key=lambda item: -item[1])
    gained = [(name, change) for name, change in changes if change > 0][:most]
    lost = [(name, change) for name, change in changes if change < 0][-most:]
    return [(name, short[name], change) for name, change in (*gained, *lost)]


def short_names(run: RunNumbers) -> dict[str, str]:
    """Per module, its block and projection: `3 · down_proj`."""
    grid = grid_of(list(run.last.ranks))
    return {
        name: grid.columns[column] if grid.rows[row] == "–" else f"{grid.rows[row]} · {grid.columns[column]}"
        for name, (row, column) in grid.cells.items()
    }


def by_projection(run: RunNumbers, values: Mapping[str, int]) -> dict[str, int]:
    """The sums of values by module, per projection."""
    grid = grid_of(list(run.last.ranks))
    sums = dict.fromkeys(grid.columns, 0)
    for name, value in values.items():
        if name in grid.cells:
            sums[grid.columns[grid.cells[name][1]]] += value
    return sums


def worth_chart(run: RunNumbers, worth: Worth, *, width: Width = CONTAINER, title: Any = "") -> ChartLike:
    """One tick per rank: its score at the last allocation with scores, by projection; kept, or pruned then."""
    import altair as alt

    points, label, scale = _ticks(run, worth)
    columns = [column for column in by_projection(run, {}) if any(p["projection"] == column for p in points)]
    base = alt.Chart(data(points))
    ticks = base.mark_tick(thickness=1.6, height={"band": 0.7}, opacity=0.75).encode(
        y=alt.Y("projection:N", sort=columns, title=None).axis(labelLimit=150, grid=True, ticks=False, domain=False),
        x=alt.X("shown:Q", title=label, scale=scale).axis(grid=False, format="~g", labelOverlap=True, tickCount=5),
        color=alt.Color("fate:N", title=None, scale=alt.Scale(domain=["kept", "pruned"], range="category")).legend(
            orient="top", symbolType="square"
        ),
        tooltip=[
            alt.Tooltip("module:N", title="module"),
            alt.Tooltip("rank:Q", title="rank number"),
            alt.Tooltip("score:Q", format=".4g"),
            alt.Tooltip("fate:N", title="then"),
        ],
    )
    return ticks.properties(width=width, height=28 * len(columns), title=title)


def _ticks(run: RunNumbers, worth: Worth) -> tuple[list[dict[str, Any]], str, Any]:
    """The ticks, the axis's label and its scale."""
    import altair as alt

    grid = grid_of(list(run.last.ranks))
    found: list[dict[str, Any]] = []
    for name, scores in worth.scores.items():
        if name not in grid.cells:
            continue
        gone = set(worth.pruned.get(name, ()))
        found += [
            {
                "projection": grid.columns[grid.cells[name][1]],
                "module": name,
                "rank": index,
                "score": float(score),
                "fate": "pruned" if index in gone else "kept",
            }
            for index, score in enumerate(scores)
            if math.isfinite(score)
        ]
    found = thinned(found, MOST_TICKS)
    values = sorted(point["score"] for point in found)
    lowest, highest, middle = values[0], values[-1], values[len(values) // 2]
    # a loss without the rank drowns the differences: only those are shown
    base = 0.0 if lowest >= 0 else lowest
    if highest - base > WIDE * (middle - base) or (lowest >= 0 and highest > WIDE * max(lowest, 1e-300)):
        positive = [value - base for value in values if value > base]
        least = positive[len(positive) // 100] if positive else 1.0
        for point in found:
            point["shown"] = max(point["score"] - base, least)
        label = "score, logarithmic" if base == 0 else f"score above the lowest ({_minus(lowest)}), logarithmic"
        return found, label, alt.Scale(type="log", nice=False, padding=6)
    for point in found:
        point["shown"] = point["score"] - base
    label = "score" if base == 0 else f"score above the lowest ({_minus(lowest)})"
    return found, label, alt.Scale(zero=False, nice=False, padding=6)


def _minus(value: float) -> str:
    return f"{value:.4g}".replace("-", "−")
