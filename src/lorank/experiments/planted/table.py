"""The results of the planted study: a table for a terminal, table.md, and a picture."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from lorank.experiments.planted.methods import METHODS
from lorank.experiments.planted.metrics import gap_closed, mean_and_interval, rank_overlap
from lorank.experiments.planted.problem import Scenario
from lorank.experiments.planted.study import Row
from lorank.extras import require
from lorank.files import write_text

TABLE, PICTURE = "table.md", "gap.png"
ENOUGH_SEEDS, ENOUGH_STEPS = 3, 1000
"""With fewer, the picture warns its readers."""
HEAD = (
    "method",
    "share of the gap closed",
    "95 %",
    "every seed",
    "test loss",
    "energy found",
    "overlap",
    "ranks",
    "parameters",
    "seconds",
    "of which scoring",
    "lr",
)


def closed_by_seed(row: Row, rows: Sequence[Row]) -> dict[int, float] | None:
    """The share of the gap that a method closed, per seed. A failed run is −∞.

    None if the rows do not have both references, uniform and true ranks.
    """
    references = {r.method: r for r in rows if r.method in ("uniform", "oracle")}
    if len(references) < 2:
        return None
    return {
        seed: gap_closed(_test(run), _test(references["uniform"].runs[seed]), _test(references["oracle"].runs[seed]))
        for seed, run in sorted(row.runs.items())
    }


def energy(run: Mapping[str, Any]) -> float:
    """The fraction of the planted energy that was found, over all modules. Every planted rank has equal weight."""
    true = {name: rank for name, rank in run["true"].items() if rank}
    found = run.get("energy") or {}
    return float(sum(found.get(name, 0.0) * rank for name, rank in true.items()) / sum(true.values()))


def cells(row: Row, rows: Sequence[Row]) -> list[str]:
    """One line of the table, as text."""
    method, runs = METHODS[row.method], [row.runs[seed] for seed in sorted(row.runs)]
    closed = closed_by_seed(row, rows)
    shares = ["", "", ""]
    if closed is not None:
        mean, error, lower, upper = mean_and_interval(list(closed.values()))
        shares = [
            f"{mean:.1%} ± {error:.1%}" if math.isfinite(error) else f"{mean:.1%}",
            f"{lower:.0%} to {upper:.0%}" if math.isfinite(lower) else "",
            ", ".join(f"{share:.0%}" for share in closed.values()),
        ]
    whole = [run for run in runs if run["failure"] is None]
    knob = f", {method.knob} {row.knob:g}" if method.knob else ""
    return [
        method.title + (f" ({len(runs) - len(whole)} of {len(runs)} failed)" if len(whole) < len(runs) else ""),
        *shares,
        _mean(runs, _test, "{:.4f}"),
        _mean(whole, energy, "{:.1%}"),
        _mean(whole, lambda run: rank_overlap(run["ranks"], run["true"]), "{:.1%}"),
        _mean(whole, lambda run: sum(run["ranks"].values()), "{:.1f}"),
        _mean(whole, lambda run: run["parameters"][1], "{:,.0f}"),
        _mean(whole, lambda run: run["seconds"], "{:.1f}"),
        _mean(whole, lambda run: run["scoring"], "{:.1f}"),
        f"{row.lr:g}{knob}",
    ]


def rich_table(rows: Sequence[Row], scenario: Scenario, *, quick: bool = False) -> Table:
    """The table for a terminal."""
    table = Table(title=_title(rows, scenario, quick))
    for number, name in enumerate(HEAD):
        table.add_column(name, justify="left" if not number else "right")
    for row in rows:
        table.add_row(*cells(row, rows))
    return table


def write_results(rows: Sequence[Row], scenario: Scenario, out: Path, *, quick: bool = False) -> list[Path]:
    """Writes table.md, and the picture if the rows have both references. Returns the files."""
    lines = [
        f"{_title(rows, scenario, quick)}. Means over seeds {', '.join(map(str, sorted(rows[0].runs)))}; ± is the "
        "standard error, the interval a bootstrap's. Learning rates (and one knob, where named) were chosen on other "
        "seeds.",
        "",
        _markdown(HEAD),
        _markdown(["---"] * len(HEAD)),
        *(_markdown(cells(row, rows)) for row in rows),
        "",
        "Selection loss of every setting that was tried, mean over the tuning seeds:",
        "",
        *(
            f"- {METHODS[row.method].title}: "
            + "; ".join(f"{_settings(row, settings)}: {loss:.4f}" for settings, loss in row.tuning.items())
            for row in rows
        ),
        *(
            f"- failed: {METHODS[row.method].title}, seed {seed}: {run['failure']}"
            for row in rows
            for seed, run in sorted(row.runs.items())
            if run["failure"]
        ),
    ]
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / TABLE, "\n".join(lines) + "\n")
    if closed_by_seed(rows[0], rows) is None:
        return [out / TABLE]
    return [out / TABLE, picture(rows, out / PICTURE, _title(rows, scenario, quick), steps=scenario.steps)]


def warning(rows: Sequence[Row], steps: int) -> str:
    """Why the shares show less than they seem to; "" if every method has enough seeds and steps."""
    seeds = min((len(row.runs) for row in rows), default=0)
    few = [
        *([f"{seeds} seed{'s' if seeds != 1 else ''}"] if seeds < ENOUGH_SEEDS else []),
        *([f"{steps} steps"] if steps < ENOUGH_STEPS else []),
    ]
    if not few:
        return ""
    return (
        f"Only {' of '.join(few)}: this shows that the command works, not which method is better "
        f"(at least {ENOUGH_SEEDS} seeds, {ENOUGH_STEPS} steps)"
    )


def picture(rows: Sequence[Row], path: Path, title: str, *, steps: int = ENOUGH_STEPS) -> Path:
    """Writes a PNG: per method, the share of the gap closed (every seed, mean, interval), overlap and energy found.

    With few seeds or few steps, a line under the picture warns of it.
    """
    require("the picture of a study", "matplotlib")
    # The object interface, not pyplot: it has no global state and needs no window system with any user's backend.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 1.6 + 0.42 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, sharey=True)
    for place, row in enumerate(rows):
        closed = [share for share in (closed_by_seed(row, rows) or {}).values() if math.isfinite(share)]
        if closed:
            mean, _, lower, upper = mean_and_interval(closed)
            left.plot(closed, [place] * len(closed), "o", color="tab:blue", alpha=0.35, ms=5)
            left.plot([mean], [place], "D", color="tab:blue", ms=6)
            if math.isfinite(lower):
                left.plot([lower, upper], [place, place], color="tab:blue", lw=2)
        whole = [run for run in row.runs.values() if run["failure"] is None]
        if whole:
            overlaps = [rank_overlap(run["ranks"], run["true"]) for run in whole]
            right.barh(place - 0.2, statistics.fmean(overlaps), 0.36, color="tab:grey")
            right.barh(place + 0.2, statistics.fmean(map(energy, whole)), 0.36, color="tab:orange")
    left.axvline(0, color="black", lw=0.8)
    left.axvline(1, color="black", lw=0.8)
    left.set_yticks(range(len(rows)), [METHODS[row.method].title for row in rows], fontsize=9)
    left.invert_yaxis()
    left.set_xlabel("share of the gap closed: 0 uniform ranks, 1 true ranks")
    right.barh([-9], [0], color="tab:grey", label="true ranks that are covered")
    right.barh([-9], [0], color="tab:orange", label="planted energy found")
    right.set_ylim(len(rows) - 0.5, -0.5)
    right.set_xlim(0, 1)
    right.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2)
    figure.suptitle(title, fontsize=10)
    doubt = warning(rows, steps)
    if doubt:
        figure.supxlabel(doubt, fontsize=10, color="tab:red")
    figure.savefig(path, dpi=150)
    return path


def _title(rows: Sequence[Row], scenario: Scenario, quick: bool) -> str:
    budgets = [run["budget"] for run in rows[0].runs.values()]
    modules = len(next(iter(rows[0].runs.values()))["true"])
    planted = f"{min(budgets)} to {max(budgets)}" if min(budgets) < max(budgets) else f"{budgets[0]}"
    title = f"Ranks planted in {scenario.where}: {planted} in {modules} modules, {scenario.steps} steps"
    return f"{title}, a quick look" if quick else title


def _settings(row: Row, settings: tuple[float, Any]) -> str:
    lr, knob = settings
    name = METHODS[row.method].knob
    return f"lr {lr:g}" + (f", {name} {knob:g}" if name else "")


def _test(run: Mapping[str, Any]) -> float:
    return math.inf if run["test"] is None else float(run["test"])


def _mean(runs: Sequence[Mapping[str, Any]], figure: Callable[[Mapping[str, Any]], float], form: str) -> str:
    return form.format(statistics.fmean(map(figure, runs))) if runs else ""


def _markdown(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
