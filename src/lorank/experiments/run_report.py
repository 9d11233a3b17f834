"""`lorank report`: reads runs and comparisons, and writes the page, the figures and the numbers."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorank.experiments.errors import SettingsError
from lorank.experiments.report_sources import Source
from lorank.experiments.run_numbers import read_comparison, read_run
from lorank.files import write_text
from lorank.report import words
from lorank.report.charts import ChartLike, write_chart
from lorank.report.comparison import compare_runs
from lorank.report.heatmap import head_chart, head_projections, rank_chart
from lorank.report.numbers import Comparison, RunNumbers
from lorank.report.page import comparison_figures, report_page, run_figures

MARK = "· lorank</title>"
"""Every report has it near its beginning, so that it can be told from a user's own page."""
WIDTH = 560
"""Pixels of a figure in a file, before it is scaled."""
MOST_BYTES = 6_000_000


@dataclass(frozen=True)
class Report:
    """What was read.

    Args:
        runs: the runs.
        comparisons: those of `lorank compare`, then those that the runs allow.
    """

    runs: Sequence[RunNumbers]
    comparisons: Sequence[Comparison]

    def write_page(self, path: Path, *, title: str = "") -> Path:
        """Writes the page. An existing file is replaced (see :func:`check_out`).

        Raises:
            SettingsError: the page would be larger than 6 MB.
            MissingPackageError: a package of the extra `report` is not installed.
            WriteError: no space, no permission.
        """
        page = report_page(self.runs, self.comparisons, title=title)
        size = len(page.encode())
        if size > MOST_BYTES:
            raise SettingsError(
                f"the report of {len(self.runs)} runs would have {size / 1e6:.1f} MB, more than "
                f"{MOST_BYTES / 1e6:.0f}: make one for fewer runs"
            )
        write_text(path, page)
        return path

    def write_figures(self, folder: Path, ending: str) -> list[Path]:
        """Writes every figure as a file. Files of the same names are replaced.

        Args:
            folder: is made if there is none.
            ending: ".png" or ".svg".

        Returns:
            The files.
        """
        charts: dict[str, ChartLike] = {}
        for run in self.runs:
            prefix = "" if len(self.runs) == 1 else f"{_file_name(run.name)}-"
            charts[f"{prefix}ranks"] = rank_chart(run, "rank", width=WIDTH)
            if any(run.changes.values()):
                charts[f"{prefix}ranks-change"] = rank_chart(run, "change", width=WIDTH)
            for projection in head_projections(run):
                charts[f"{prefix}heads-{_file_name(projection)}"] = head_chart(run, projection, width=WIDTH)
            for figure in run_figures(run):
                charts[f"{prefix}{figure.name}"] = figure.chart.properties(width=WIDTH)
        for number, comparison in enumerate(self.comparisons):
            for figure in comparison_figures(comparison):
                charts[f"{number}-{figure.name}" if number else figure.name] = figure.chart.properties(width=WIDTH)
        return [write_chart(chart, folder / f"{name}{ending}") for name, chart in charts.items()]

    def to_dict(self) -> dict[str, Any]:
        """The numbers of the report, JSON-serialisable. NaN and infinity are null."""
        runs = [
            {
                "name": run.name,
                "method": run.method,
                "summary": words.lead(run),
                "asked": dict(run.asked),
                "came_out": dict(run.came_out),
                "cost": dict(run.cost),
                "notes": list(run.notes),
                "quality": None if run.quality is None else {run.quality.metric: run.quality.value},
                "reference": {"name": run.reference_name, "ranks": dict(run.reference)},
                "allocations": [
                    {
                        "step": frame.step,
                        "ranks": dict(frame.ranks),
                        "total_rank": frame.total,
                        "parameters": frame.parameters,
                        "limit": frame.limit,
                        "pruned": frame.pruned,
                        "added": frame.added,
                    }
                    for frame in run.frames
                ],
                "loss": [{"step": step, "loss": loss} for step, loss in run.losses],
                "validation_loss": [{"step": step, "loss": loss} for step, loss in run.validation],
                "scores": None
                if run.worth is None
                else {
                    "step": run.worth.step,
                    "scores": {name: list(some) for name, some in run.worth.scores.items()},
                    "pruned": {name: list(some) for name, some in run.worth.pruned.items()},
                },
            }
            for run in self.runs
        ]
        comparisons = [
            {
                "title": one.title,
                "metric": one.metric,
                "higher_is_better": one.higher_is_better,
                "sentence": one.sentence,
                "warning": one.warning,
                "groups": {name: [vars(estimate) for estimate in some] for name, some in one.groups.items()},
            }
            for one in self.comparisons
        ]
        found: dict[str, Any] = _finite({"runs": runs, "comparisons": comparisons})
        return found


def read(sources: Sequence[Source], comparisons: Sequence[Path]) -> Report:
    """Reads everything.

    Raises:
        LorankError: a history or a comparison cannot be read.
    """
    runs = [read_run(source) for source in sources]
    return Report(runs, [*map(read_comparison, comparisons), *compare_runs(runs)])


def check_out(path: Path, *, overwrite: bool) -> None:
    """Checks that a report may be written to a file: to a new one, or over an earlier report.

    Raises:
        SettingsError: it is a folder, or a file that is no report and may not be replaced.
    """
    if path.is_dir():
        raise SettingsError(f"--out {path} is a folder: name a file, for example {path / 'report.html'}")
    if not path.exists() or overwrite:
        return
    with path.open("rb") as file:
        if MARK.encode() not in file.read(4000):
            raise SettingsError(
                f"--out {path} is no report of lorank and would be replaced: name another file, or give --overwrite"
            )


def _file_name(text: str) -> str:
    """A name for files: letters, digits, dots, dashes."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-.") or "run"


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _finite(part) for key, part in value.items()}
    return [_finite(part) for part in value] if isinstance(value, list | tuple) else value
