"""The Pareto front of size and loss, and its picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lorank.extras import require

MAX_LABELS = 14
"""With more points, only those on the front are labelled."""


@dataclass(frozen=True)
class Point:
    """One setting.

    Args:
        label: its name in the picture.
        size: its cost, lower is better.
        loss: lower is better.
        spread: standard deviation of the loss over seeds; 0: one seed, or unknown.
    """

    label: str
    size: float
    loss: float
    spread: float = 0.0


def pareto_front(points: Sequence[Point]) -> list[Point]:
    """The points that no other point beats. A point is beaten by another one whose size and loss are at most equal and
    one of them is lower.

    Points with a NaN loss are never on the front. The front is sorted by size; equal points are all kept.
    """
    front: list[Point] = []
    best = math.inf
    for point in sorted((p for p in points if not math.isnan(p.loss)), key=lambda p: (p.size, p.loss)):
        if point.loss < best or (front and (point.size, point.loss) == (front[-1].size, front[-1].loss)):
            front.append(point)
            best = point.loss
    return front


def pareto_picture(points: Sequence[Point], path: str | Path, *, size: str, loss: str, title: str = "") -> Path:
    """Writes a PNG: a point for every setting, the front in colour and, from three points on, as a step line.

    Points on the front have labels; the others too, unless there are more than `MAX_LABELS` points.

    Args:
        points: at least one point has a finite loss.
        path: the file to write.
        size: label of the horizontal axis.
        loss: label of the vertical axis.
        title: a line above the picture.

    Returns:
        The file's path.

    Raises:
        MissingPackageError: matplotlib is not installed.
    """
    require("pareto_picture", "matplotlib")
    # The object interface, not pyplot: it has no global state and needs no window system with any user's backend.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import StrMethodFormatter

    front = pareto_front(points)
    figure = Figure(figsize=(7.5, 5.0), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    drawn = [point for point in points if math.isfinite(point.loss) and math.isfinite(point.size)]
    for chosen, colour in ((True, "tab:blue"), (False, "tab:grey")):
        group = [point for point in drawn if (point in front) is chosen]
        if not group:
            continue
        axis.errorbar(
            [point.size for point in group],
            [point.loss for point in group],
            yerr=[point.spread for point in group] if any(point.spread for point in group) else None,
            fmt="o",
            color=colour,
            capsize=3,
            zorder=3 if chosen else 2,
            label="on the Pareto front" if chosen else "beaten by another setting",
        )
    if len(front) > 2:  # a step between two points shows nothing that the points do not
        axis.step([p.size for p in front], [p.loss for p in front], where="post", color="tab:blue", lw=1, alpha=0.6)
    middle = (min(p.size for p in drawn) + max(p.size for p in drawn)) / 2
    labelled = drawn if len(drawn) <= MAX_LABELS else [point for point in drawn if point in front]
    groups = _group_by_distance(labelled)
    for group in groups:
        point = group[0]
        right = point.size > middle  # the label extends towards the middle, where there is space
        axis.annotate(
            "\n".join(same.label for same in group),
            (point.size, point.loss),
            xytext=(-6 if right else 6, 4),
            ha="right" if right else "left",
            va="bottom",
            textcoords="offset points",
            fontsize=8,
        )
    axis.set_xlabel(size)
    axis.set_ylabel(loss)
    axis.set_title(title, fontsize=11)
    axis.margins(0.08, 0.1)
    low, high = axis.get_ylim()
    lines = max((len(group) for group in groups), default=0)
    axis.set_ylim(low, high + 0.03 * lines * (high - low))  # room for the lines above the highest point
    axis.xaxis.set_major_formatter(StrMethodFormatter("{x:,.10g}"))
    axis.grid(alpha=0.25, lw=0.6)
    axis.spines[["top", "right"]].set_visible(False)
    if len(front) < len(drawn):  # with one kind of point, there is nothing to tell apart
        axis.legend(fontsize=8)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    return path


def _group_by_distance(points: Sequence[Point], near: float = 0.02) -> list[list[Point]]:
    """Groups of points so close that their labels would overlap. ``near`` is a fraction of the length of the axes."""
    width = max(p.size for p in points) - min(p.size for p in points)
    height = max(p.loss for p in points) - min(p.loss for p in points)
    groups: list[list[Point]] = []
    for point in points:
        for group in groups:
            if abs(point.size - group[0].size) <= near * width and abs(point.loss - group[0].loss) <= near * height:
                group.append(point)
                break
        else:
            groups.append([point])
    return groups
