"""The tables and the picture of benchmarks.quality:  python -m benchmarks.quality_table runs/quality.jsonl

For every task, number of steps and method: the learning rate chosen, the mean loss on the report part, its difference
to LoRA's, paired by seed, with the standard error of the mean, the p of the paired t-test (two-sided), and the share of
the gap between LoRA and LoRA of twice the parameters that the method closes, if there is one (p < 0.05). Only complete
methods are shown: all rates of the grid, and at least three seeds.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import ttest_rel

from benchmarks.quality import CASES, METHODS, finished

Line = Mapping[str, Any]
Values = np.ndarray[Any, np.dtype[np.float64]]
LEAST_SEEDS = 3


def table(lines: Sequence[Line], task: str, steps: int) -> str:
    """One table in Markdown; empty if LoRA or LoRA of twice the parameters is not complete."""
    base, double = (finished(lines, task, method, steps) for method in ("lora", "lora2x"))
    if min(len(base), len(double)) < LEAST_SEEDS:
        return ""
    has_accuracy = "accuracy" in next(iter(base.values()))
    columns = ["method", "rate", "parameters", "at most", "seeds", "loss", "− LoRA", "p", "gap closed"]
    rows = [columns + ["accuracy"] * has_accuracy]
    for method, found in ((method, finished(lines, task, method, steps)) for method in METHODS):
        if len(found) < LEAST_SEEDS:
            continue
        runs = list(found.values())
        both = sorted(set(found) & set(base) & set(double))
        own, lora, twice = (np.array([x[seed]["report"] for seed in both]) for x in (found, base, double))
        row = [
            METHODS[method].title,
            f"{runs[0]['lr']:g}",
            f"{np.mean([run['parameters'] for run in runs]):,.0f}",
            f"{np.mean([run['most_parameters'] for run in runs]):,.0f}",
            str(len(runs)),
            f"{np.mean([run['report'] for run in runs]):.4f}",
        ]
        if method == "lora":
            row += ["", "", "0"]
        else:
            difference = own - lora
            error = difference.std(ddof=1) / len(both) ** 0.5
            p = float(ttest_rel(own, lora).pvalue)
            row += [f"{difference.mean():+.4f} ± {error:.4f}".replace("-", "−"), f"{p:.1g}"]
            share = 100 * (lora.mean() - own.mean()) / (lora.mean() - twice.mean())
            row.append(f"{share:.0f} %".replace("-", "−") if _is_gap(lora, twice) else "no gap")
        if has_accuracy:
            row.append(f"{np.mean([run['accuracy'] for run in runs]):.3f}")
        rows.append(row)
    rows.insert(1, ["---"] * len(rows[0]))
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _is_gap(lora: Values, twice: Values) -> bool:
    """Whether LoRA of twice the parameters is better at all, beyond chance."""
    return bool(twice.mean() < lora.mean() and ttest_rel(twice, lora).pvalue < 0.05)


def picture(lines: Sequence[Line], path: Path) -> None:
    """One panel per task and number of steps: every seed of every method, and the means."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = [
        (task, steps)
        for steps in sorted({line["steps"] for line in lines})
        for task in CASES
        if table(lines, task, steps)
    ]
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4.6 * columns, 3.8 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    for axis, (task, steps) in zip(axes, panels, strict=False):
        shown = [m for m in METHODS if len(finished(lines, task, m, steps)) >= LEAST_SEEDS]
        for place, method in enumerate(reversed(shown)):
            values = [line["report"] for line in finished(lines, task, method, steps).values()]
            colour = {"balanced": "tab:red", "lora": "black", "lora2x": "black"}.get(method, "tab:blue")
            axis.plot(values, [place] * len(values), "o", color=colour, alpha=0.35, markersize=5)
            axis.plot([np.mean(values)], [place], "|", color=colour, markersize=22, markeredgewidth=2.5)
        axis.set_yticks(range(len(shown)), [METHODS[method].title for method in reversed(shown)])
        for method in ("lora", "lora2x"):
            mean = np.mean([line["report"] for line in finished(lines, task, method, steps).values()])
            axis.axvline(mean, color="grey", linewidth=0.8, linestyle=":")
        axis.set_title(f"{task}, {steps} steps", fontsize=10)
        axis.set_xlabel("loss, lower is better")
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--picture", type=Path, help="also write this PNG")
    given = parser.parse_args()
    lines = [json.loads(line) for line in given.results.read_text().splitlines()]
    for steps in sorted({line["steps"] for line in lines}):
        for task in CASES:
            found = table(lines, task, steps)
            if found:
                print(f"\n### {task}, {steps} steps\n\n{found}")
    if given.picture is not None:
        picture(lines, given.picture)


if __name__ == "__main__":
    main()
