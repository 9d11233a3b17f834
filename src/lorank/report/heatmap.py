"""A heat map of ranks: blocks × projections, before and after a run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from lorank.extras import require
from lorank.report.grid import grid_of


def rank_heatmap(panels: Mapping[str, Mapping[str, int]], path: str | Path, *, title: str = "") -> Path:
    """Writes a PNG with one heat map of ranks per panel, all with one colour scale.

    Args:
        panels: per panel title, the rank of each module; all panels have the same modules.
        path: the file to write.
        title: a line above all panels.

    Returns:
        The file's path.

    Raises:
        MissingPackageError: matplotlib is not installed.
    """
    require("rank_heatmap", "matplotlib")
    # The object interface, not pyplot: it has no global state and needs no window system with any user's backend.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    path = Path(path)
    grid = grid_of(list(next(iter(panels.values()))))
    tables = {name: grid.values(ranks) for name, ranks in panels.items()}
    highest = max(1.0, *(float(np.nanmax(table)) for table in tables.values()))
    width = max(3.2, 1.0 + 0.62 * len(grid.columns))
    height = max(2.4, 1.5 + 0.36 * len(grid.rows))
    figure = Figure(figsize=(width * len(panels) + 0.8, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for axis, (name, table) in zip(axes, tables.items(), strict=True):
        image = axis.imshow(table, vmin=0, vmax=highest, cmap="viridis", aspect="auto")
        axis.set_title(f"{name}: {int(np.nansum(table))} ranks", fontsize=10)
        axis.set_xticks(range(len(grid.columns)), grid.columns, rotation=40, ha="right", fontsize=8)
        axis.set_yticks(range(len(grid.rows)), grid.rows, fontsize=8)
        for (row, column), rank in np.ndenumerate(table):
            if not np.isnan(rank):
                colour = "white" if rank < 0.6 * highest else "black"
                axis.text(column, row, f"{int(rank)}", ha="center", va="center", fontsize=8, color=colour)
    axes[0].set_ylabel("block")
    figure.colorbar(image, ax=list(axes), label="rank", shrink=0.9)
    if title:
        figure.suptitle(title, fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    return path
