"""What pictures show, in words: the sentence above a run, the sentence of each figure, and the tables beside them."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lorank.report.charts import thinned
from lorank.report.grid import grid_of
from lorank.report.heatmap import head_rows
from lorank.report.modules import by_projection, most_changed
from lorank.report.numbers import Comparison, CurveNumbers, Estimate, RunNumbers, Table, Worth

MOST_ROWS = 40
"""Rows of a table of steps."""


def lead(run: RunNumbers) -> str:
    """What came out, in two or three sentences."""
    moved = [frame for frame in run.frames if frame.pruned or frame.added]
    if not moved:
        parts = [f"{run.method} moved no rank."]
    else:
        pruned, added = sum(f.pruned for f in moved), sum(f.added for f in moved)
        counts = " and ".join(
            text for count, text in ((pruned, f"pruned {pruned:,}"), (added, f"added {added:,}")) if count
        )
        times = "1 allocation" if len(moved) == 1 else f"{len(moved)} allocations"
        parts = [f"{run.method} {counts} ranks in {times}, the last after step {moved[-1].step:,}."]
        parts += [text for text in (changed_sentence(run),) if text]
    if run.quality is not None:
        parts.append(f"The {run.quality.metric} is {run.quality.value:.4f}.")
    if run.last.parameters:
        limit = next((frame.limit for frame in reversed(run.frames) if frame.limit), None)
        used = f", {run.last.parameters / limit:.1%} of its budget" if limit else ""
        parts.append(f"The adapter has {run.last.parameters:,} LoRA parameters{used}.")
    return " ".join(parts)


def changed_sentence(run: RunNumbers) -> str:
    """Which projections gained and lost ranks; "" if none."""
    sums = sorted(by_projection(run, run.changes).items(), key=lambda item: -item[1])
    gained = [f"{name} ({signed(total)})" for name, total in sums if total > 0][:3]
    lost = [f"{name} ({signed(total)})" for name, total in reversed(sums) if total < 0][:3]
    parts = [f"{', '.join(some)} {verb}" for some, verb in ((gained, "gained"), (lost, "lost")) if some]
    return f"Compared with {run.reference_name}, {' and '.join(parts)} most." if parts else ""


def ranks_sentence(run: RunNumbers) -> str:
    """What the heat map shows at the end of the run."""
    ranks = run.last.ranks
    top = max(ranks, key=ranks.__getitem__)
    empty = sum(not rank for rank in ranks.values())
    none = f", and {empty} of {len(ranks)} modules have none" if empty else ""
    total = f"At the end, after step {run.last.step:,}, there are {run.last.total:,} ranks."
    return f"{total} {top} has the most, {ranks[top]}{none}."


def ranks_table(run: RunNumbers) -> Table:
    """Blocks × projections: the rank at the end, and its change."""
    grid = grid_of(list(run.last.ranks))
    texts = [["" for _ in grid.columns] for _ in grid.rows]
    for name, (row, column) in grid.cells.items():
        change = run.changes[name]
        texts[row][column] = f"{run.last.ranks[name]}" + (f" ({signed(change)})" if change else "")
    return ("block", *grid.columns), [[label, *cells] for label, cells in zip(grid.rows, texts, strict=True)]


def heads_table(run: RunNumbers, projection: str) -> Table:
    """Blocks × attention heads: the ranks at the end."""
    rows, grid = head_rows(run.last.heads, projection)
    ranks: dict[str, list[str]] = {block: [] for block in grid.rows}
    for row in rows:
        ranks[row["block"]].append(str(row["rank"]))
    return ("block", *(f"head {head}" for head in grid.columns)), [[block, *some] for block, some in ranks.items()]


def loss_sentence(run: RunNumbers) -> str:
    parts = [
        f"{name} loss went from {points[0][1]:.4f} at step {points[0][0]:,} "
        f"to {points[-1][1]:.4f} at step {points[-1][0]:,}"
        for name, points in (("validation", run.validation), ("training", run.losses))
        if points
    ]
    return f"The {'; the '.join(parts)}."


def loss_table(run: RunNumbers) -> Table:
    training, validation = dict(run.losses), dict(run.validation)
    steps = sorted({*(step for step, _ in thinned(run.losses, MOST_ROWS)), *validation})
    rows = [
        [f"{step:,}", *(f"{of[step]:.4f}" if step in of else "" for of in (training, validation))]
        for step in thinned(steps, 2 * MOST_ROWS)
    ]
    return ("step", "training loss", "validation loss"), rows


def size_sentence(run: RunNumbers) -> str:
    first, last = run.frames[0], run.last
    budget = next((frame.limit for frame in reversed(run.frames) if frame.limit), None)
    limit = f" The budget allows {round(budget):,}." if budget else ""
    if first.parameters == last.parameters:
        return f"The adapter has {last.parameters:,} LoRA parameters throughout.{limit}"
    return f"The adapter begins with {first.parameters:,} LoRA parameters and ends with {last.parameters:,}.{limit}"


def size_table(run: RunNumbers) -> Table:
    rows = [
        [
            f"{frame.step:,}",
            f"{frame.total:,}",
            f"{frame.parameters:,}",
            "" if frame.limit is None else f"{round(frame.limit):,}",
            str(frame.pruned),
            str(frame.added),
        ]
        for frame in thinned(run.frames, 2 * MOST_ROWS)
    ]
    return ("step", "ranks", "LoRA parameters", "allowed", "pruned", "added"), rows


def change_sentence(run: RunNumbers) -> str:
    changes = run.changes.values()
    gained, lost = [c for c in changes if c > 0], [c for c in changes if c < 0]
    text = f"{len(gained)} modules gained {sum(gained):,} ranks, {len(lost)} lost {-sum(lost):,}"
    top = [f"{label} ({signed(change)})" for _, label, change in most_changed(run, 2)]
    return f"{text}; most: {', '.join(top)}."


def change_table(run: RunNumbers) -> Table:
    rows = [
        [name, str(run.reference.get(name, 0)), str(run.last.ranks[name]), signed(change)]
        for name, change in sorted(run.changes.items(), key=lambda item: -item[1])
    ]
    return ("module", run.reference_name, "at the end", "change"), rows


def worth_sentence(run: RunNumbers, worth: Worth) -> str:
    count = sum(map(len, worth.scores.values()))
    gone = sum(map(len, worth.pruned.values()))
    means = {row[0]: row[1] for row in _worth_rows(run, worth)}
    best = max(means, key=lambda name: means[name]) if means else ""
    return (
        f"At step {worth.step:,}, {run.method} scored {count:,} ranks and pruned {gone:,} of them. "
        f"The median rank is worth most in {best}."
    )


def worth_table(run: RunNumbers, worth: Worth) -> Table:
    """Per projection: its ranks, the scores, and how many were pruned."""
    rows = [
        [name, str(count), f"{low:.4g}", f"{middle:.4g}", f"{high:.4g}", str(gone)]
        for name, middle, low, high, count, gone in _worth_rows(run, worth)
    ]
    return ("projection", "ranks scored", "lowest", "median", "highest", "pruned"), rows


def curve_sentence(curve: CurveNumbers) -> str:
    first, last = curve.points[0], curve.points[-1]
    knee = (
        f" The knee is at {curve.knee[0]:,} parameters, loss {curve.knee[1]:.4f}: beyond it, parameters pay less than "
        "on average."
        if curve.knee
        else ""
    )
    ends = f"from {first[1]:.4f} with {first[0]:,} parameters to {last[1]:.4f} with {last[0]:,}"
    return f"The predicted loss falls {ends}.{knee}"


def curve_table(curve: CurveNumbers) -> Table:
    rows = [[f"{size:,}", f"{loss:.4f}", "knee" if (size, loss) == curve.knee else ""] for size, loss in curve.points]
    return ("parameters", "predicted loss", ""), rows


def comparison_table(comparison: Comparison, group: str) -> Table:
    estimates = comparison.groups[group]
    more = list(dict.fromkeys(key for one in estimates for key in one.more))
    sized = any(one.parameters is not None for one in estimates)
    head = ("", comparison.metric, "95 % interval", "every seed", *(("parameters",) if sized else ()), *more)
    return head, [_comparison_row(one, more, sized=sized) for one in estimates]


def comparison_sentence(comparison: Comparison, group: str) -> str:
    return "; ".join(
        f"{one.label}: {one.mean:#.4g}" + (f" ({one.low:#.4g} to {one.high:#.4g})" if math.isfinite(one.low) else "")
        for one in comparison.groups[group]
    )


def _comparison_row(one: Estimate, more: Sequence[str], *, sized: bool) -> list[str]:
    interval = f"{one.low:#.4g} to {one.high:#.4g}" if math.isfinite(one.low) else "one seed: none"
    size = [f"{round(one.parameters):,}" if one.parameters is not None else ""] if sized else []
    values = ", ".join(f"{value:#.4g}" for value in one.values)
    return [one.label, f"{one.mean:#.4g}", interval, values, *size, *(one.more.get(key, "") for key in more)]


def _worth_rows(run: RunNumbers, worth: Worth) -> list[tuple[str, float, float, float, int, int]]:
    grid = grid_of(list(run.last.ranks))
    rows = []
    for index, column in enumerate(grid.columns):
        names = [name for name in worth.scores if name in grid.cells and grid.cells[name][1] == index]
        scores = sorted(float(s) for name in names for s in worth.scores[name] if math.isfinite(s))
        if scores:
            gone = sum(len(worth.pruned.get(name, ())) for name in names)
            rows.append((column, scores[len(scores) // 2], scores[0], scores[-1], len(scores), gone))
    return rows


def signed(change: int) -> str:
    """+3, −2 (with a minus sign), 0."""
    return f"{change:+d}".replace("-", "−") if change else "0"
