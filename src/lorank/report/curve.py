"""The picture of a rank curve: loss against the number of parameters, on a logarithmic axis."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lorank.extras import require

COLOURS = ("tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple")


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
    """Writes a PNG: the lines, and the knee of the first.

    Args:
        lines: at least one, each with at least one point. The first is drawn with the strongest stroke.
        path: the file to write.
        knee: (parameters, loss) of the knee; None: it is not marked.
        title: a line above the picture.

    Returns:
        The file's path.

    Raises:
        MissingPackageError: matplotlib is not installed.
    """
    require("curve_picture", "matplotlib")
    # The object interface, not pyplot: it has no global state and needs no window system with any user's backend.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, NullLocator

    figure = Figure(figsize=(7.5, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    for index, line in enumerate(lines):
        axis.plot(
            [parameters for parameters, _ in line.points],
            [loss for _, loss in line.points],
            marker="o",
            markersize=5 if index else 6,
            lw=1.4 if index else 2.2,
            linestyle="-" if index == 0 else "--",
            color=COLOURS[index % len(COLOURS)],
            label=line.label,
            zorder=3 - min(index, 2),
        )
    if knee is not None:
        axis.axvline(knee[0], color="black", lw=0.8, ls=":", zorder=1)
        axis.annotate(
            f"knee: {short(knee[0])}",
            knee,
            xytext=(-90, -28),
            textcoords="offset points",
            fontsize=9,
            arrowprops={"arrowstyle": "->", "lw": 0.8},
        )
    axis.set_xscale("log", base=2)
    # the largest adapter and its halves are the budgets that people name
    largest = max(parameters for line in lines for parameters, _ in line.points)
    smallest = min(parameters for line in lines for parameters, _ in line.points)
    ticks = [float(largest)]
    while ticks[-1] / 2 >= smallest * 0.99:
        ticks.append(ticks[-1] / 2)
    axis.set_xticks(ticks)
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short(round(value))))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.set_xlabel("parameters of the adapter (numbers in A and B)")
    axis.set_ylabel("loss")
    axis.set_title(title, fontsize=11)
    axis.grid(alpha=0.25)
    axis.margins(0.05, 0.08)
    axis.legend(fontsize=9)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    return path


def short(count: int) -> str:
    """A number of parameters, short: 830, 41.5k, 2.1M."""
    for size, letter in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if count >= size:
            return f"{count / size:.3g}{letter}"
    return str(count)
