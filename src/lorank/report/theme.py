"""Colours and fonts of all pictures, in a light and a dark form, as configurations of Vega-Lite.

Pictures name colours by their role, in `style` and `range`; so the same picture is drawn in both forms. Ranks are
shades of one blue; changes go from orange (lost) over grey to blue (gained), which colour-blind readers can tell apart.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

Theme = Literal["light", "dark"]


class Colours(NamedTuple):
    """The colours of one form, by their role."""

    page: str
    text: str
    faint: str
    grid: str
    gained: str
    lost: str
    second: str
    on_low: str
    on_high: str
    ranks: tuple[str, ...]
    changes: tuple[str, ...]


COLOURS: dict[Theme, Colours] = {
    "light": Colours(
        page="#ffffff",
        text="#1b2733",
        faint="#5a6875",
        grid="#e3e8ed",
        gained="#1f63b5",
        lost="#c2570c",
        second="#7a8794",
        on_low="#1b2733",
        on_high="#ffffff",
        ranks=("#eef3f9", "#b9d1ea", "#6fa3d6", "#2f6fb7", "#123e77"),
        changes=("#8f3d05", "#d97b2b", "#f3c79b", "#f1f3f5", "#a9c9ea", "#3f82c6", "#123e77"),
    ),
    "dark": Colours(
        page="#12181f",
        text="#e6ebf0",
        faint="#a3b0bd",
        grid="#2b3540",
        gained="#6db1f5",
        lost="#f2994a",
        second="#8796a5",
        on_low="#e6ebf0",
        on_high="#0c1116",
        ranks=("#1b242e", "#24405f", "#2f6399", "#5196d8", "#a9d3fb"),
        changes=("#ffc68f", "#e08a3c", "#7d4a1d", "#28323c", "#2a4f78", "#4f97db", "#b5dafc"),
    ),
}

PAPER_FONT = "Liberation Sans, Arial, sans-serif"
"""In PNG and SVG files. vl-convert brings this font with it, so that every machine draws the same."""
PAGE_FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Liberation Sans', sans-serif"


def config(theme: Theme, font: str = PAPER_FONT) -> dict[str, Any]:
    """The configuration of Vega-Lite for a form."""
    colour = COLOURS[theme]
    axis = {
        "domainColor": colour.second,
        "tickColor": colour.second,
        "gridColor": colour.grid,
        "labelColor": colour.text,
        "titleColor": colour.faint,
        "labelFontSize": 12,
        "titleFontSize": 12,
        "titleFontWeight": "normal",
    }
    return {
        "background": colour.page,
        "font": font,
        "aria": False,  # the page gives every figure one description and a table, which read better than its marks
        "view": {"stroke": None},
        "axis": axis,
        "legend": {
            "labelColor": colour.text,
            "titleColor": colour.faint,
            "titleFontWeight": "normal",
            "labelFontSize": 12,
            "titleFontSize": 12,
        },
        "title": {
            "color": colour.text,
            "subtitleColor": colour.faint,
            "fontSize": 14,
            "subtitleFontSize": 12,
            "anchor": "start",
            "offset": 12,
        },
        "range": {
            "ordinal": list(colour.ranks),
            "ramp": list(colour.ranks),
            "heatmap": list(colour.ranks),
            "diverging": list(colour.changes),
            "category": [colour.gained, colour.lost, colour.second],
        },
        "style": {
            "cell": {"stroke": colour.page, "strokeWidth": 1},
            "on-low": {"color": colour.on_low, "fontSize": 11},
            "on-high": {"color": colour.on_high, "fontSize": 11},
            "strong": {"color": colour.gained, "strokeWidth": 2},
            "strong-point": {"color": colour.gained, "filled": True, "size": 55, "opacity": 1},
            "faint-point": {"color": colour.second, "filled": True, "size": 26, "opacity": 1},
            "limit": {"color": colour.lost, "strokeDash": [5, 4], "strokeWidth": 1.5},
            "event": {"color": colour.second, "strokeDash": [2, 3], "strokeWidth": 1},
            "event-tick": {"color": colour.second, "thickness": 1, "size": 8, "opacity": 1},
            "shown": {"color": colour.text, "strokeWidth": 1.5},
            "zero": {"color": colour.second, "strokeWidth": 1},
            "note": {"color": colour.faint, "fontSize": 12},
            "label": {"color": colour.text, "fontSize": 12},
        },
    }
