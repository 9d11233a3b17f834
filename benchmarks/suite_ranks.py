"""Where the ranks of the suite's runs ended: which projections earned them, and whether seeds and methods agree."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from scipy.stats import spearmanr

from benchmarks.markdown import head, line

if TYPE_CHECKING:
    from benchmarks.suite import Task

Ranks = Mapping[str, int]


def by_projection(runs: Sequence[Ranks]) -> dict[str, float]:
    """Per projection (the end of a module's name), its mean rank over blocks and runs, relative to the mean of all."""
    found: dict[str, list[int]] = {}
    for ranks in runs:
        for name, rank in ranks.items():
            found.setdefault(name.rpartition(".")[2], []).append(rank)
    overall = statistics.fmean(itertools.chain(*found.values()))
    return {name: statistics.fmean(values) / overall for name, values in found.items()}


def agreement(runs: Sequence[Ranks], others: Sequence[Ranks] | None = None) -> float | None:
    """The mean Spearman correlation of ranks by module over all pairs of runs.

    Args:
        runs: ranks of the runs of a method, one per seed.
        others: those of another method; None: pairs within ``runs``.

    Returns:
        −1 to 1; None: there is no pair in which both have unequal ranks.
    """
    pairs = itertools.combinations(runs, 2) if others is None else itertools.product(runs, others)
    found = [
        float(spearmanr(list(a.values()), [b[name] for name in a]).statistic)
        for a, b in pairs
        if len(set(a.values())) > 1 and len(set(b.values())) > 1
    ]
    return float(np.mean(found)) if found else None


def moving(task: Task) -> dict[str, list[Ranks]]:
    """Per method whose final ranks are unequal, the ranks of its test runs. Controls with given ranks are left out."""
    found = {name: task.ranks(name) for name in task.methods if not name.startswith("final ranks")}
    return {name: runs for name, runs in found.items() if any(len(set(ranks.values())) > 1 for ranks in runs)}


def tables(task: Task) -> list[str]:
    """Two tables of a task as lines of Markdown: ranks by projection, and agreement. Empty: no method moved a rank."""
    runs = moving(task)
    if not runs:
        return []
    projections = list(by_projection(next(iter(runs.values()))))
    lines = [f"**{task.name}**, mean rank relative to the mean of all modules:", ""]
    lines += head(["method", *projections])
    for name, some in runs.items():
        relative = by_projection(some)
        lines.append(line([name, *(f"{relative[projection]:.2f}" for projection in projections)]))
    lines += ["", "Spearman correlation of ranks by module, on the diagonal between seeds:", ""]
    lines += head(["", *runs])
    for name, some in runs.items():
        cells = [agreement(some, None if name == other else others) for other, others in runs.items()]
        lines.append(line([name, *("" if cell is None else f"{cell:.2f}" for cell in cells)]))
    return [*lines, ""]
