"""The report: one HTML file that holds its pictures, their data and the code that draws them, and loads nothing.

Folders may come from strangers. Every text goes through the template's escaping; data are JSON in which no tag can
begin; and a policy in the page lets the browser run the page's own two scripts, known by their hashes, and load
nothing.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from lorank._version import __version__
from lorank.extras import require
from lorank.report import words
from lorank.report.charts import ChartLike, thinned, unchecked
from lorank.report.comparison import comparison_chart
from lorank.report.comparison import size_chart as comparison_size_chart
from lorank.report.curve import Line, curve_chart
from lorank.report.grid import grid_of
from lorank.report.heatmap import head_chart, head_projections, head_rows, highest, rank_chart
from lorank.report.modules import MOST_TICKS, change_chart, worth_chart
from lorank.report.numbers import Comparison, RunNumbers, Table
from lorank.report.steps import loss_chart, size_chart
from lorank.report.theme import PAGE_FONT, config

TEMPLATE, STYLE, CODE = "page.html", "page.css", "page.js"
CELLS = "cells"
"""The name of the data that the page's slider replaces."""
MOST_LABELS = 14
"""Dots with labels in one figure."""
MOST_NUMBERS = 300_000
"""Ranks in the page, over all frames of all runs."""


@dataclass(frozen=True)
class Figure:
    """One figure.

    Args:
        name: its name in files, e.g. "loss".
        title: its heading.
        sentence: what it shows, for readers who do not see it.
        table: the same in numbers.
        chart: a chart of Altair that fills its container.
        about: how to read it.
    """

    name: str
    title: str
    sentence: str
    table: Table
    chart: ChartLike
    about: str = ""


@dataclass(frozen=True)
class Section:
    """One run in the page."""

    run: RunNumbers
    lead: str
    figures: Sequence[Figure]
    slider: dict[str, Any] = field(default_factory=dict)
    heads: Sequence[str] = ()


def report_page(runs: Sequence[RunNumbers], comparisons: Sequence[Comparison] = (), *, title: str = "") -> str:
    """The HTML of a report.

    Args:
        runs: the runs, each with a name of its own.
        comparisons: methods or settings side by side.
        title: the page's title; "": made from the runs.

    Raises:
        MissingPackageError: a package of the extra `report` is not installed.
    """
    require("The report", "altair", "vl_convert")
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    sections = [_section(run, MOST_NUMBERS // len(runs)) for run in runs]
    compared = [(one, comparison_figures(one)) for one in comparisons]
    here = Path(__file__).parent
    environment = Environment(
        loader=FileSystemLoader(here), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    code = (here / CODE).read_text(encoding="utf-8")
    scripts = [_script(_vega()), _script(code)]
    numbers = {
        "themes": {theme: config(theme, PAGE_FONT) for theme in ("light", "dark")},
        "comparisons": [[unchecked(figure.chart) for figure in figures] for _, figures in compared],
        "runs": [
            {"specs": {figure.name: unchecked(figure.chart) for figure in section.figures}, **section.slider}
            for section in sections
        ],
    }
    return environment.get_template(TEMPLATE).render(
        title=title or _title(runs, comparisons),
        version=__version__,
        sections=sections,
        comparisons=compared,
        style=Markup((here / STYLE).read_text(encoding="utf-8")),
        scripts=[Markup(script) for script in scripts],
        hashes=[_hash(script) for script in scripts],
        numbers=Markup(_json(numbers)),
        ranks_sentence=words.ranks_sentence,
        ranks_table=words.ranks_table,
        heads_table=words.heads_table,
    )


def run_figures(run: RunNumbers) -> list[Figure]:
    """The figures of one run, except the heat maps of ranks, for pages and files."""
    found = []
    if run.losses or run.validation:
        found.append(
            Figure(
                "loss",
                "Loss over the steps",
                words.loss_sentence(run),
                words.loss_table(run),
                loss_chart(run),
                "Dotted lines, or marks on the axis if there are many: allocations that moved ranks. "
                "Solid line: the step at which the slider stands.",
            )
        )
    if run.last.parameters:
        found.append(
            Figure(
                "size",
                "Size and budget over the steps",
                words.size_sentence(run),
                words.size_table(run),
                size_chart(run),
                "Numbers in A and B, all modules. Dashed: what the budget allows at that step.",
            )
        )
    if any(run.changes.values()):
        found.append(
            Figure(
                "change",
                "Which modules gained and lost",
                words.change_sentence(run),
                words.change_table(run),
                change_chart(run),
                f"The ten that gained most and the ten that lost most, compared with {run.reference_name}.",
            )
        )
    if run.worth is not None and words.worth_table(run, run.worth)[1]:
        count = sum(map(len, run.worth.scores.values()))
        found.append(
            Figure(
                "worth",
                "What the ranks are worth",
                words.worth_sentence(run, run.worth),
                words.worth_table(run, run.worth),
                worth_chart(run, run.worth),
                "One mark per rank: its score at the last allocation, in the method's own unit. Higher is better. "
                "On a logarithmic axis the lowest stand at its left edge."
                + (f" Of {count:,} ranks, {MOST_TICKS:,} are drawn." if count > MOST_TICKS else ""),
            )
        )
    if run.curve is not None:
        line = Line(run.curve.title, run.curve.points)
        found.append(
            Figure(
                "curve",
                "Rank curve: the predicted loss of every smaller budget",
                words.curve_sentence(run.curve),
                words.curve_table(run.curve),
                curve_chart([line], knee=run.curve.knee),
                f"Measured on {run.curve.title}. It orders budgets; a cut without training loses more.",
            )
        )
    return found


def comparison_figures(comparison: Comparison) -> list[Figure]:
    """One figure per group of a comparison; and one of quality over size, if sizes are known and differ."""
    found = [_group_figure(comparison, group) for group in comparison.groups]
    sized = [one for some in comparison.groups.values() for one in some if one.parameters and math.isfinite(one.mean)]
    if len({one.parameters for one in sized}) > 1 and len(sized) <= MOST_LABELS:
        best = (max if comparison.higher_is_better else min)(sized, key=lambda one: one.mean)
        found.append(
            Figure(
                "comparison-size",
                f"{comparison.metric} and size",
                f"The best {comparison.metric}, {best.mean:.4g}, has {round(best.parameters or 0):,} parameters.",
                (
                    ("", "parameters", comparison.metric),
                    [[o.label, f"{o.parameters:,.0f}", f"{o.mean:#.4g}"] for o in sized],
                ),
                comparison_size_chart(comparison),
                "Each dot is one row of the tables above.",
            )
        )
    return found


def _group_figure(comparison: Comparison, group: str) -> Figure:
    return Figure(
        f"comparison-{list(comparison.groups).index(group)}",
        f"{comparison.metric}{f', budget {group}' if group else ''}",
        words.comparison_sentence(comparison, group),
        words.comparison_table(comparison, group),
        comparison_chart(comparison, group),
        "Large dot: the mean. Line: its 95 % interval over seeds, by Student's t. Small dots: the seeds.",
    )


def _section(run: RunNumbers, most: int) -> Section:
    grid, frames = grid_of(list(run.last.ranks)), _kept_frames(run, most)
    names = list(grid.cells)
    heads = head_projections(run)
    slider: dict[str, Any] = {
        "steps": [frame.step for frame in frames],
        "totals": [frame.total for frame in frames],
        "parameters": [frame.parameters for frame in frames],
        "cells": [
            [grid.rows[row], grid.columns[column], name, run.reference.get(name, 0)]
            for name, (row, column) in grid.cells.items()
        ],
        "ranks": [[frame.ranks.get(name, 0) for name in names] for frame in frames],
        "maps": {
            shown: unchecked(rank_chart(run, shown, top=highest(run, shown), name=CELLS))
            for shown in ("rank", "change")
        },
        "heads": {projection: _heads(run, frames, projection) for projection in heads},
    }
    return Section(run, words.lead(run), run_figures(run), slider, heads)


def _heads(run: RunNumbers, frames: Sequence[Any], projection: str) -> dict[str, Any]:
    """The heat map of a projection's heads and their ranks in every frame; null where a frame knows none."""
    cells, _ = head_rows(run.last.heads, projection)
    ranks = []
    for frame in frames:
        rows, _ = head_rows(frame.heads, projection)
        ranks.append([row["rank"] for row in rows] if len(rows) == len(cells) else None)
    return {
        "map": unchecked(head_chart(run, projection, name=CELLS)),
        "cells": [[cell["block"], cell["projection"]] for cell in cells],
        "ranks": ranks,
    }


def _kept_frames(run: RunNumbers, most: int) -> list[Any]:
    per_frame = len(run.last.ranks) + sum(map(len, run.last.heads.values()))
    return thinned(run.frames, max(2, most // max(1, per_frame)))


def _title(runs: Sequence[RunNumbers], comparisons: Sequence[Comparison]) -> str:
    if len(runs) == 1:
        return f"{runs[0].method}: {runs[0].name}"
    if not runs and len(comparisons) == 1:
        return f"Comparison: {comparisons[0].title}"
    return f"{len(runs)} runs" if runs else f"{len(comparisons)} comparisons"


def _json(values: Any) -> str:
    """JSON that can stand in a script element: no tag and no comment can begin in it."""
    text = json.dumps(values, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


@cache
def _vega() -> str:
    """Vega, Vega-Lite and what embeds them, as one script."""
    import vl_convert

    return str(vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;"))


def _script(code: str) -> str:
    return code.replace("</script", "<\\/script").replace("\r\n", "\n")


def _hash(script: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
