"""The figures of the suite's page: loss by size of LoRA, and validation loss by learning rate."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

if TYPE_CHECKING:
    from benchmarks.suite import Task

HIGHLIGHTED = {
    "LoRA": "black",
    "BalancedLoRA": "tab:red",
    "ALoRA": "tab:blue",
    "ARD-LoRA": "tab:green",
    "SoRA": "tab:purple",
    "AdaLoRA": "tab:orange",
}
OTHERS = "lightgrey"
COLUMNS = 3


def capacity(tasks: Sequence[Task], path: Path) -> None:
    """Test loss of LoRA by its size, with full fine-tuning, and with some methods at their size."""
    figure, axes = _panels(tasks, 3.2)
    for axis, task in zip(axes, tasks, strict=False):
        sizes = task.sizes
        axis.errorbar(
            list(sizes),
            [row["mean"] for row in sizes.values()],
            [row["stderr"] or 0 for row in sizes.values()],
            color="black",
            marker="o",
            markersize=4,
            label="LoRA × k",
        )
        for name, colour in HIGHLIGHTED.items():
            if name != "LoRA" and name in task.methods:
                axis.plot([1], [task.methods[name]["mean"]], "D", color=colour, markersize=6, label=name)
        if task.full is not None:
            axis.axhline(task.full["mean"], color="grey", linestyle=":", label="full fine-tuning")
        axis.set_xscale("log", base=2)
        axis.set_xticks(list(sizes), [f"{k:g}" for k in sizes])
        axis.set_xlabel(f"parameters, as a multiple of {task.budget}", fontsize=8)
        axis.set_ylabel(f"test {task.result['metric']}", fontsize=8)
        axis.set_title(task.name + ("" if task.separates else " (sizes not separated)"), fontsize=10)
    _add_legend(figure, axes)
    figure.savefig(path, dpi=120)


def rates(tasks: Sequence[Task], path: Path) -> None:
    """Validation loss of every method by learning rate; a cross is the chosen rate."""
    figure, axes = _panels(tasks, 3.6)
    for axis, task in zip(axes, tasks, strict=False):
        lowest = min(_losses(row)[1] for row in task.methods.values())
        for name, row in task.methods.items():
            points = [(float(lr), loss) for lr, loss in row["lr_grid"].items() if loss is not None]
            colour = HIGHLIGHTED.get(name, OTHERS)
            front = 3 if name in HIGHLIGHTED else 1
            label = name if name in HIGHLIGHTED else "other methods"
            axis.plot(*zip(*sorted(points), strict=True), color=colour, linewidth=1.2, zorder=front, label=label)
            best = _losses(row)
            axis.plot([best[0]], [best[1]], "x", color=colour, markersize=5, zorder=front)
        axis.set_xscale("log")
        tried = sorted({float(lr) for row in task.methods.values() for lr in row["lr_grid"]})
        axis.set_xticks(tried, [f"{lr:g}" for lr in tried], fontsize=7, rotation=45)
        axis.minorticks_off()
        worst = max(_losses(row)[1] for row in task.methods.values())
        span = worst - lowest or 0.1 * abs(worst)  # there may be one method alone
        axis.set_ylim(lowest - 0.1 * span, worst + 1.5 * span)
        axis.set_xlabel("learning rate", fontsize=8)
        axis.set_ylabel("validation loss", fontsize=8)
        axis.set_title(task.name, fontsize=10)
    _add_legend(figure, axes)
    figure.savefig(path, dpi=120)


def _losses(row: Any) -> tuple[float, float]:
    """(the chosen learning rate, its validation loss)."""
    return float(row["lr"]), float(row["lr_grid"][f"{row['lr']:g}"])


def _add_legend(figure: Figure, axes: Sequence[Any]) -> None:
    """One legend of all panels, above them."""
    entries = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    figure.legend(entries.values(), entries.keys(), loc="outside upper center", ncols=len(entries), fontsize=8)


def _panels(tasks: Sequence[Task], height: float) -> tuple[Figure, list[Any]]:
    columns = min(COLUMNS, len(tasks))
    rows = math.ceil(len(tasks) / columns)
    figure = Figure(figsize=(4.2 * columns, height * rows), layout="constrained")
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis in axes[len(tasks) :]:
        axis.set_axis_off()
    return figure, axes[: len(tasks)]
