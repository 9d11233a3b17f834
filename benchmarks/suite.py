"""The page of the suite, made from finished comparisons.   python -m benchmarks.suite docs/results/suite

Every folder in the given one is the output of `lorank compare suite/TASK`: comparison.json, results.jsonl, table.md.
The command writes index.md and its figures beside them. It says nothing that is not in these files.

How methods are put together over tasks:

- **k**: LoRA with k times the parameters is as good, by interpolation between LoRAs of other sizes; mean of log k.
- **Place**: the place of a method on a task, 1 the best, among the methods that all tasks have; mean over tasks.
- **Holm**: p of the difference to LoRA (paired bootstrap over seeds and test examples), corrected for all methods and
  tasks of the page by Holm's method.

Only tasks that separate sizes count: LoRA of twice the parameters must be better than LoRA, its interval without 0, and
LoRA of half the parameters, if it was measured, must be worse. The others are shown.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.markdown import head, line
from benchmarks.suite_figures import capacity, rates
from benchmarks.suite_ranks import tables

BASELINE = "LoRA"
LEVEL = 0.05


@dataclass(frozen=True)
class Task:
    """One budget of a finished comparison.

    Args:
        name: the name of its folder; with several budgets also the budget.
        folder: the name of its folder.
        budget: the budget, as comparison.json calls it.
        result: its comparison.json.
        lines: the runs at this budget, lines of results.jsonl.
    """

    name: str
    folder: str
    budget: str
    result: Mapping[str, Any]
    lines: Sequence[Mapping[str, Any]]

    @property
    def seconds(self) -> float:
        """The computing time of all runs."""
        return sum(float(line["seconds"]) for line in self.lines)

    def ranks(self, method: str) -> list[Mapping[str, int]]:
        """The final ranks of a method's test runs, by module."""
        return [
            line["ranks"]
            for line in self.lines
            if (line["method"], line["stage"]) == (method, "test") and line.get("ranks")
        ]

    @property
    def rows(self) -> list[Mapping[str, Any]]:
        """The rows of the budget."""
        return [row for row in self.result["rows"] if row["budget"] == self.budget]

    @property
    def methods(self) -> dict[str, Mapping[str, Any]]:
        """By name, the methods of the budget's size, with a result: no references and no full fine-tuning."""
        return {
            row["method"]: row
            for row in self.rows
            if row["reference"] is None and row["sized"] and row["mean"] is not None
        }

    @property
    def sizes(self) -> dict[float, Mapping[str, Any]]:
        """LoRA of other sizes, by k, ascending; 1 is the baseline."""
        found = {float(row["reference"]): row for row in self.rows if row["reference"] is not None}
        return dict(sorted({**found, 1.0: self.methods[BASELINE]}.items()))

    @property
    def full(self) -> Mapping[str, Any] | None:
        """Full fine-tuning."""
        return next((row for row in self.rows if not row["sized"] and row["mean"] is not None), None)

    @property
    def separates(self) -> bool:
        """Whether LoRA of twice the parameters is better, and LoRA of half of them not."""
        half, twice = self.sizes.get(0.5), self.sizes.get(2.0)
        more = bool(twice and twice["difference"]["real"] and self.gain(twice) > 0)
        return more and (half is None or self.gain(half) < 0)

    def gain(self, row: Mapping[str, Any]) -> float:
        """By how much a row is better than LoRA, in the unit of the metric."""
        sign = 1 if self.result["higher_is_better"] else -1
        return float(sign * (row["mean"] - self.methods[BASELINE]["mean"]))

    def places(self, among: Iterable[str]) -> dict[str, float]:
        """Per method of ``among``, its place, 1 the best; equal means share their mean place."""
        gains = {name: self.gain(self.methods[name]) for name in among}
        return {
            name: 1 + sum(other > gain for other in gains.values()) + (list(gains.values()).count(gain) - 1) / 2
            for name, gain in gains.items()
        }

    def share_of_full(self, row: Mapping[str, Any]) -> float | None:
        """The improvement of a row as a share of full fine-tuning's; None: it was not measured."""
        full = self.full
        if full is None or full.get("untrained_loss") is None or self.result["metric"] != "loss":
            return None
        return float((full["untrained_loss"] - row["mean"]) / (full["untrained_loss"] - full["mean"]))


def read(folder: Path) -> list[Task]:
    """All budgets of all finished comparisons in a folder, by name, those that separate sizes first."""
    tasks = []
    for path in sorted(folder.glob("*/comparison.json")):
        lines = [json.loads(line) for line in (path.parent / "results.jsonl").read_text().splitlines()]
        result, own = json.loads(path.read_text()), path.parent.name
        for budget in result["budgets"]:
            name = own if len(result["budgets"]) == 1 else f"{own}, {budget}"
            tasks.append(Task(name, own, budget, result, [line for line in lines if line["budget"] == budget]))
    return sorted(tasks, key=lambda task: not task.separates)


def holm(values: Mapping[Any, float]) -> dict[Any, float]:
    """p-values corrected for their number by Holm's method: the smallest times n, the next times n − 1, …"""
    corrected, largest = {}, 0.0
    for place, (key, p) in enumerate(sorted(values.items(), key=lambda item: item[1])):
        largest = max(largest, min(1.0, p * (len(values) - place)))
        corrected[key] = largest
    return corrected


def corrected(tasks: Sequence[Task]) -> dict[tuple[str, str], float]:
    """Holm-corrected p of every method on every task, by (task, method)."""
    found = {
        (task.name, name): row["difference"]["p"]
        for task in tasks
        for name, row in task.methods.items()
        if row["difference"] is not None and row["difference"]["p"] is not None
    }
    return holm(found)


def page(tasks: Sequence[Task]) -> str:
    """index.md."""
    compared = [task for task in tasks if len(task.methods) > 1]
    dropped = [task.name for task in tasks if not task.separates]
    not_counted = [f"{_and(dropped)}: more parameters are not always better. Not counted in places and k.", ""]
    folders = {task.folder: task for task in tasks}
    runs, count = sum(len(task.lines) for task in tasks), len(folders)
    hours = sum(task.seconds for task in tasks) / 3600
    text = [
        "# The suite",
        "",
        "<!-- written by `python -m benchmarks.suite docs/results/suite` -->",
        "",
        f"{runs:,} runs on {count} task{'s' if count > 1 else ''}, {hours:.1f} hours in all, on machines that did "
        "other work too. How it was done: [comparing methods](../../comparing.md); what was compared: "
        "`src/lorank/recipes/suite`; which commands: [results](../index.md). Time and memory: "
        "[speed](../../performance.md).",
        "",
        "## Does size matter?",
        "",
        "![Test loss by size of LoRA, for every task](capacity.png)",
        "",
        *_sizes(tasks),
        "",
        *(not_counted if dropped else []),
        "## All methods",
        "",
        *([] if compared else ["No methods were compared yet.", ""]),
        "Test loss minus LoRA's, at equal trained parameters, each method at its own learning rate. Bold: better, and "
        f"in italics: worse, p < {LEVEL} after Holm's correction for all cells. In brackets, and k: worth LoRA with k "
        "times the parameters. Places and mean k are over the tasks that separate sizes; places are among the "
        "methods that all of them have.",
        "",
        *(_methods(compared, corrected(tasks)) if compared else []),
        "",
        "![Learning rates that were tried, and validation loss, for every method and task](rates.png)",
        "",
        "## Beside the loss",
        "",
        *_beside(tasks),
        "",
        "## Where the ranks went",
        "",
        *(line for task in tasks for line in tables(task)),
        "## Tasks",
        "",
        'One task at a time, so without a correction for the number of comparisons: "better" and "worse" are those '
        "whose 95 % interval leaves out 0.",
        "",
        *(f"- [{name}]({name}/table.md): {task.result['sentence']}" for name, task in folders.items()),
    ]
    return "\n".join(text) + "\n"


def _sizes(tasks: Sequence[Task]) -> list[str]:
    every = sorted({k for task in tasks for k in task.sizes})
    lines = head(["task", *(f"LoRA × {k:g}" for k in every), "full", "untrained"])
    for task in tasks:
        cells = [f"{task.sizes[k]['mean']:.4f}" if k in task.sizes else "" for k in every]
        full = task.full
        more = ["", ""] if full is None else [f"{full['mean']:.4f}", _number(full.get("untrained_loss"), ".4f")]
        lines.append(line([task.name, *cells, *more]))
    return lines


def _methods(tasks: Sequence[Task], p: Mapping[tuple[str, str], float]) -> list[str]:
    counted = [task for task in tasks if task.separates]
    titles = {name: row["title"] for task in tasks for name, row in task.methods.items()}
    columns = [task.name if task.separates else f"{task.name} (not counted)" for task in tasks]
    lines = head(["method", *columns, "mean place", "k"])
    complete = [name for name in titles if counted and all(name in task.methods for task in counted)]
    by_task = [task.places(complete) for task in counted]
    places = {name: [places[name] for places in by_task] for name in complete}
    for name in sorted(titles, key=lambda name: _mean(places.get(name, [])) or math.inf):
        cells = [_cell(task, name, p.get((task.name, name))) for task in tasks]
        mean = f"{statistics.fmean(places[name]):.1f}" if name in places else ""
        lines.append(line([titles[name], *cells, mean, _number(mean_k(counted, name), ".2f")]))
    return lines


def mean_k(tasks: Sequence[Task], name: str) -> float | None:
    """The geometric mean of k over tasks; None: a task gives no k, or lacks the method."""
    found = [1.0 if name == BASELINE else task.methods.get(name, {}).get("equivalent_k") for task in tasks]
    if not found or any(k is None for k in found):
        return None
    return math.exp(statistics.fmean(math.log(k) for k in found if k is not None))


def _cell(task: Task, name: str, p: float | None) -> str:
    row = task.methods.get(name)
    if row is None:
        return ""
    if name == BASELINE:
        return f"({row['mean']:.4f})"
    text = f"{row['mean'] - task.methods[BASELINE]['mean']:+.4f}"
    if row["equivalent_k"] is not None:
        text += f" ({row['equivalent_k']:.1f})"
    if p is None or p >= LEVEL:
        return text
    return f"**{text}**" if task.gain(row) > 0 else f"*{text}*"


def _beside(tasks: Sequence[Task]) -> list[str]:
    """Size on the way, forgetting, and the share of full fine-tuning's gain."""
    titles = {name: row["title"] for task in tasks for name, row in task.methods.items()}
    lines = head(["method", "largest size / final", "of full's gain", "other text"])
    for name, title in titles.items():
        rows = [(task, task.methods[name]) for task in tasks if name in task.methods]
        sizes = [row["most_parameters"] / row["parameters"] for _, row in rows]
        shares = [share for task, row in rows if (share := task.share_of_full(row)) is not None]
        other = [row["other_loss"] - row["other_loss_before"] for _, row in rows if row.get("other_loss") is not None]
        cells = [statistics.fmean(sizes), _mean(shares), _mean(other)]
        forms = [".1f", ".1%", "+.3f"]
        lines.append(line([title, *(_number(cell, form) for cell, form in zip(cells, forms, strict=True))]))
    return lines


def _and(names: Sequence[str]) -> str:
    return ", ".join(names[:-1]) + " and " + names[-1] if len(names) > 1 else "".join(names)


def _mean(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=Path("docs/results/suite"))
    given = parser.parse_args(arguments)
    tasks = read(given.folder)
    if not tasks:
        parser.error(f"{given.folder} holds no folder with a comparison.json: run `lorank compare suite/TASK` first")
    capacity(tasks, given.folder / "capacity.png")
    rates(tasks, given.folder / "rates.png")
    (given.folder / "index.md").write_text(page(tasks), encoding="utf-8")
    count = len({task.folder for task in tasks})
    print(f"wrote {given.folder / 'index.md'}, capacity.png and rates.png from {count} comparisons")


if __name__ == "__main__":
    main()
