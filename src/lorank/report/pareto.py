"""Quality against size: which runs no other run beats in both, as a picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lorank.extras import require


@dataclass(frozen=True)
class Point:
    """One setting.

    Args:
        label: its name in the picture.
        size: what it costs, lower is better.
        loss: how good it is, lower is better.
        spread: standard deviation of the loss over seeds; 0: one seed, or none known.
    """

    label: str
    size: float
    loss: float
    spread: float = 0.0


def pareto_front(points: Sequence[Point]) -> list[Point]:
    """The points that no other point beats: none is at most as large and at most as bad, and better in one of them.

    Points whose loss is not a number never are. Sorted by size; of several equal points all are kept.
    """
    front: list[Point] = []
    best = math.inf
    for point in sorted((p for p in points if not math.isnan(p.loss)), key=lambda p: (p.size, p.loss)):
        if point.loss < best or (front and (point.size, point.loss) == (front[-1].size, front[-1].loss)):
            front.append(point)
            best = point.loss
    return front


def pareto_picture(points: Sequence[Point], path: str | Path, *, size: str, loss: str, title: str = "") -> Path:
    """Writes a PNG: every point with its label, the front as a line of steps.

    Args:
        points: at least one with a finite loss.
        path: the file to write.
        size: what the horizontal axis counts.
        loss: what the vertical axis counts.
        title: a line above.

    Returns:
        The file's path.

    Raises:
        MissingPackageError: matplotlib is not installed.
    """
    require("pareto_picture", "matplotlib")
    # The object interface, not pyplot: no global state, no window system, whatever the user's backend is.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    front = pareto_front(points)
    figure = Figure(figsize=(7.5, 5.0), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    drawn = [point for point in points if math.isfinite(point.loss)]
    for chosen, colour in ((True, "tab:blue"), (False, "tab:grey")):
        group = [point for point in drawn if (point in front) is chosen]
        axis.errorbar(
            [point.size for point in group],
            [point.loss for point in group],
            yerr=[point.spread for point in group],
            fmt="o",
            color=colour,
            capsize=3,
            zorder=3 if chosen else 2,
            label="on the Pareto front" if chosen else "beaten in both",
        )
    if len(front) > 1:
        axis.step([p.size for p in front], [p.loss for p in front], where="post", color="tab:blue", lw=1, alpha=0.6)
    middle = (min(p.size for p in drawn) + max(p.size for p in drawn)) / 2
    for group in _together(drawn):
        point = group[0]
        right = point.size > middle  # the label grows towards the middle, where there is room
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
    axis.legend(fontsize=8)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    return path


def _together(points: Sequence[Point], near: float = 0.02) -> list[list[Point]]:
    """Points that lie so close that their labels would cover each other, in groups: ``near`` is a part of the axes."""
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
