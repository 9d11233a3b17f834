"""What all charts share: data, widths, and files for papers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from lorank.extras import require
from lorank.files import replacing_file
from lorank.report.theme import Theme, config

if TYPE_CHECKING:
    import altair

ChartLike = Any
"""A chart of Altair: `Chart`, `LayerChart`, `HConcatChart`, …"""

CONTAINER = "container"
"""A chart of this width fills its place in the page."""
Width = int | str


def data(rows: Iterable[Mapping[str, Any]], name: str | None = None) -> altair.InlineData:
    """Rows as a chart's data. Numbers that are NaN or infinite become null, which JSON can hold."""
    import altair
    from altair.utils.schemapi import debug_mode

    values = [{key: _finite(value) for key, value in row.items()} for row in rows]
    with debug_mode(False):  # a check of every row against the schema
        return altair.InlineData(values=cast(Any, values), name=name or altair.Undefined)


def spec(chart: ChartLike, theme: Theme = "light", **changes: Any) -> dict[str, Any]:
    """The chart as a Vega-Lite specification with the colours of a theme."""
    found = unchecked(chart)
    found["config"] = config(theme, **changes)
    return found


def unchecked(chart: ChartLike) -> dict[str, Any]:
    """The chart as a specification. Altair's check of it against the schema takes seconds for thousands of rows."""
    return cast("dict[str, Any]", chart.to_dict(validate=False))


def themed(chart: ChartLike, theme: Theme = "light") -> Any:
    """The chart with the colours of a theme, still a chart of Altair."""
    import altair

    return altair.Chart.from_dict(spec(chart, theme))


def write_chart(chart: ChartLike, path: str | Path, *, theme: Theme = "light", scale: float = 2.0) -> Path:
    """Writes a chart as PNG or SVG, after the ending of the file's name. An existing file is replaced.

    Args:
        chart: a chart with a width in pixels.
        path: a file that ends with .png or .svg.
        theme: the form of the colours.
        scale: PNG only: pixels of the file per pixel of the chart.

    Raises:
        MissingPackageError: vl-convert-python is not installed.
        ValueError: another ending.
        WriteError: no space, no permission.
    """
    path = Path(path)
    if path.suffix not in (".png", ".svg"):
        raise ValueError(f"{path}: expected a name that ends with .png or .svg")
    require("A picture in a file", "vl_convert")
    import vl_convert

    given = spec(chart, theme)
    content = (
        vl_convert.vegalite_to_png(given, scale=scale)
        if path.suffix == ".png"
        else vl_convert.vegalite_to_svg(given).encode()
    )
    with replacing_file(path) as temporary:
        temporary.write_bytes(content)
    return path


def short(count: float) -> str:
    """A number of parameters, short: 830, 41.5k, 2.1M."""
    for size, letter in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if count >= size:
            return f"{count / size:.3g}{letter}"
    return f"{count:g}"


def thinned(points: Sequence[Any], most: int) -> list[Any]:
    """At most ``most`` of the points, evenly spread, with the first and the last."""
    if len(points) <= most:
        return list(points)
    step = (len(points) - 1) / (most - 1)
    return [points[round(index * step)] for index in range(most)]


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
