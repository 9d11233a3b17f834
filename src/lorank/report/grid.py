"""A grid of modules: one row per block of the model, one column per projection."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Grid:
    """The row and column of each module.

    Args:
        rows: labels of the blocks, in the model's order.
        columns: labels of the projections, in the model's order.
        cells: (row, column) of each module.
    """

    rows: tuple[str, ...]
    columns: tuple[str, ...]
    cells: Mapping[str, tuple[int, int]]

    def values(self, ranks: Mapping[str, int]) -> NDArray[np.float64]:
        """The ranks as a table, (rows, columns); NaN in cells without a module."""
        table = np.full((len(self.rows), len(self.columns)), np.nan)
        for name, rank in ranks.items():
            table[self.cells[name]] = rank
        return table


def grid_of(names: Sequence[str]) -> Grid:
    """Places modules by the first number in their names. The part before the number is the stack of blocks, the part
    after it is the projection.

    Modules without a number (an embedding, a head) share a block named “–”. Labels are as short as possible, and
    unique.
    """
    placed = {name: _split(name) for name in names}
    stacks = {block[0] for block, _ in placed.values() if block[1] is not None}
    rows = _in_order(
        "–" if index is None else (f"{stack}.{index}" if len(stacks) > 1 else str(index))
        for (stack, index), _ in placed.values()
    )
    short = _shortened(_in_order(projection for _, projection in placed.values()))
    columns = _in_order(short.values())
    cells = {}
    for name, ((stack, index), projection) in placed.items():
        row = "–" if index is None else (f"{stack}.{index}" if len(stacks) > 1 else str(index))
        cells[name] = (rows.index(row), columns.index(short[projection]))
    return Grid(tuple(rows), tuple(columns), cells)


def _split(name: str) -> tuple[tuple[str, int | None], str]:
    """((stack, index), projection): model.layers.3.mlp.up_proj → ((model.layers, 3), mlp.up_proj)."""
    found = re.match(r"(?:(.*?)\.)?(\d+)\.(.+)$", name)
    return ((found[1] or "", int(found[2])), found[3]) if found else (("", None), name)


def _shortened(names: Sequence[str]) -> dict[str, str]:
    """The shortest ending of each name that no other name has."""
    short = {}
    for name in names:
        parts = name.split(".")
        for count in range(1, len(parts) + 1):
            tail = ".".join(parts[-count:])
            if sum(other == tail or other.endswith(f".{tail}") for other in names) == 1:
                break
        short[name] = tail
    return short


def _in_order(labels: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(labels))
