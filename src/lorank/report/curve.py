"""The picture of a rank curve: loss against the number of parameters, on a logarithmic axis."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorank.extras import require
from lorank.report.charts import CONTAINER, ChartLike, Width, data, short, write_chart


@dataclass(frozen=True)
class Line:
    """One line of the picture.

    Args:
        label: its name.
        points: (parameters, loss), by parameters.
    """

    label: str
    points: Sequence[tuple[int, float]]


def curve_picture(
    lines: Sequence[Line], path: str | Path, *, knee: tuple[int, float] | None = None, title: str = ""
) -> Path:
    """Writes a PNG or SVG: the lines, and the knee of the first.

    Args:
        lines: at least one, each with at least one point. The first is drawn with the strongest stroke.
        path: the file to write.
        knee: (parameters, loss) of the knee; None: it is not marked.
        title: a line above the picture.

    Returns:
        The file's path.

    Raises:
        MissingPackageError: altair or vl-convert-python is not installed.
    """
    require("curve_picture", "altair", "vl_convert")
    return write_chart(curve_chart(lines, knee=knee, title=title, width=620, height=330), path)


def curve_chart(
    lines: Sequence[Line],
    *,
    knee: tuple[int, float] | None = None,
    title: str = "",
    width: Width = CONTAINER,
    height: int = 260,
) -> ChartLike:
    """The chart of :func:`curve_picture`."""
    import altair as alt

    rows = [
        {"line": line.label, "parameters": parameters, "loss": loss, "first": not index}
        for index, line in enumerate(lines)
        for parameters, loss in line.points
    ]
    x = alt.X(
        "parameters:Q",
        title="parameters of the adapter (numbers in A and B)",
        scale=alt.Scale(type="log", base=2, nice=False, padding=12),
    ).axis(values=_ticks(lines), format=".3~s", grid=True, labelOverlap=True)
    y = alt.Y("loss:Q", title="loss", scale=alt.Scale(zero=False, padding=12))
    names = [line.label for line in lines]
    several = len(lines) > 1
    colour = alt.Color("line:N", title=None, sort=names).legend(
        alt.Legend(orient="top", direction="vertical", labelLimit=0, symbolType="stroke", symbolStrokeWidth=2)
        if several
        else None
    )
    base = alt.Chart(data(rows)).encode(
        x=x, y=y, tooltip=["line:N", alt.Tooltip("parameters:Q", format=","), alt.Tooltip("loss:Q", format=".4f")]
    )
    layers: list[Any] = []
    if knee is not None:
        marked = alt.Chart(data([{"parameters": knee[0], "loss": knee[1], "text": f"knee: {short(knee[0])}"}]))
        layers = [
            marked.mark_rule(style="event").encode(x=x),
            marked.mark_text(style="label", align="left", dx=6).encode(x=x, y=alt.value(9), text="text:N"),
        ]
    # the first is drawn last, above the others; a layer without data would have no extent
    for first in (False, True) if several else (True,):
        some = base.transform_filter(f"datum.first == {str(first).lower()}").encode(color=colour)
        layers += [
            some.mark_line(strokeWidth=2.4 if first else 1.6, strokeDash=[1, 0] if first else [5, 3]),
            some.mark_point(filled=True, size=50 if first else 34, opacity=1),
        ]
    return alt.layer(*layers).properties(width=width, height=height, title=title)


def _ticks(lines: Sequence[Line]) -> list[float]:
    """The largest adapter and its halves: the budgets that people name."""
    sizes = [parameters for line in lines for parameters, _ in line.points]
    ticks = [float(max(sizes))]
    while ticks[-1] / 2 >= min(sizes) * 0.99:
        ticks.append(ticks[-1] / 2)
    return ticks[::-1]
