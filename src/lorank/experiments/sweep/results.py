"""The results of a sweep: a table of settings, every run as CSV and JSON lines, a picture, a summary for scripts."""

from __future__ import annotations

import csv
import io
import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from lorank.experiments.sweep.plan import Sweep, label_of
from lorank.experiments.sweep.queue import ERROR, SLOT, by_slot
from lorank.files import write_text
from lorank.report.pareto import Point, pareto_front, pareto_picture

if TYPE_CHECKING:
    from optuna import Study
    from optuna.trial import FrozenTrial

TABLE, CSV, LINES, PICTURE, MARKER = "table.md", "table.csv", "results.jsonl", "pareto.png", "sweep_study.json"
PARAMETERS, LOSS = "parameters", "validation loss"
OBJECTIVES = {
    "validation_loss": LOSS,
    "parameters": PARAMETERS,
    "total_rank": "total rank",
    "training_seconds": "seconds",
}
"""The figure of each objective."""
RUNS, WAS_THERE, SECONDS = "runs", "was finished before", "seconds of the trial"


@dataclass(frozen=True)
class Run:
    """A finished run.

    Args:
        seed: its `training.seed`.
        folder: the folder with its adapter, on the machine that ran it.
        figures: what the tables show, by name.
    """

    seed: int
    folder: str
    figures: Mapping[str, float]


@dataclass(frozen=True)
class Finished:
    """A finished trial: one setting with all its seeds."""

    number: int
    slot: int
    settings: Mapping[str, Any]
    runs: Sequence[Run]

    @property
    def label(self) -> str:
        """The settings in one line."""
        return label_of(self.settings)

    def mean(self, name: str) -> float:
        """The mean of a figure over the seeds; NaN if a run does not have it."""
        return statistics.fmean(run.figures.get(name, math.nan) for run in self.runs)

    def spread(self, name: str) -> float:
        """The standard deviation of a figure over the seeds; 0 for one seed."""
        return statistics.stdev([run.figures[name] for run in self.runs]) if len(self.runs) > 1 else 0.0


@dataclass(frozen=True)
class SweepResult:
    """The result of a sweep.

    Args:
        sweep: the sweep.
        finished: all finished trials, also of earlier calls and other machines; a grid's in its order, others with the
            best first.
        failures: (label, message) of each trial that failed and was not finished since.
        pruned: labels of the trials that were stopped early.
        new: number of trials that were run and finished during this call, by whichever process.
        unfinished: number of trials that wait or run; not 0 only if workers were stopped.
    """

    sweep: Sweep
    finished: Sequence[Finished]
    failures: Sequence[tuple[str, str]]
    pruned: Sequence[str]
    new: int
    unfinished: int

    @property
    def axes(self) -> tuple[str, str]:
        """The two figures that are compared: the two objectives; with one objective, validation loss and parameters."""
        names = [OBJECTIVES[name] for name in self.sweep.file.objectives]
        return (names[0], names[1]) if len(names) > 1 else (LOSS, PARAMETERS)

    @property
    def front(self) -> list[Finished]:
        """The trials that no other one beats in both figures of `axes`, smallest first."""
        made = dict(zip(map(id, points := self.points()), self.finished, strict=True))
        return [made[id(point)] for point in pareto_front(points)]

    @property
    def best(self) -> Finished | None:
        """The trial with the lowest mean of the first objective."""
        able = [trial for trial in self.finished if math.isfinite(trial.mean(self._first))]
        return min(able, key=lambda trial: trial.mean(self._first), default=None)

    @property
    def _first(self) -> str:
        return OBJECTIVES[self.sweep.file.objectives[0]]

    def points(self) -> list[Point]:
        """One point per setting: the means of the figures of `axes`, and the first one's standard deviation."""
        first, second = self.axes
        return [
            Point(trial.label, trial.mean(second), trial.mean(first), trial.spread(first)) for trial in self.finished
        ]


def figures(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The metrics of one run that the tables show, measured at the end of the run."""
    return {
        LOSS: metrics["validation"]["loss_after"],
        **{f"test {name.replace('_', ' ')}": value for name, value in metrics["test"].items()},
        PARAMETERS: metrics["final"]["trainable_parameters"],
        "total rank": metrics["final"]["ranks"],
        "seconds": metrics["seconds"]["training"],
    }


def collect(study: Study, sweep: Sweep, before: Iterable[int] = ()) -> SweepResult:
    """The state of a study.

    Args:
        study: the study.
        sweep: its sweep.
        before: numbers of trials that were finished when this call began.
    """
    from optuna.trial import TrialState

    finished, failures, pruned, new, earlier = [], [], [], 0, set(before)
    for slot, trials in sorted(by_slot(study).items()):
        if slot >= sweep.count:
            continue
        states = {trial.state: trial for trial in reversed(trials)}  # the first of each state
        if (done := states.get(TrialState.COMPLETE)) is not None:
            finished.append(_finished(done, sweep))
            new += done.number not in earlier and not done.user_attrs[WAS_THERE]
        elif (stopped := states.get(TrialState.PRUNED)) is not None:
            pruned.append(label_of(_settings(stopped, sweep)))
        elif not {TrialState.WAITING, TrialState.RUNNING} & set(states):
            last = trials[-1]
            message = last.user_attrs.get(ERROR, f"its worker stopped {len(trials)} times; see its log")
            failures.append((label_of(_settings(last, sweep)), message))
    if sweep.file.sampler != "grid":
        finished.sort(key=lambda trial: _order(trial.mean(OBJECTIVES[sweep.file.objectives[0]])))
    unfinished = sweep.count - len(finished) - len(failures) - len(pruned)
    return SweepResult(sweep, finished, failures, pruned, new, unfinished)


def done(study: Study) -> list[FrozenTrial]:
    """The finished trials of a study."""
    from optuna.trial import TrialState

    return [t for t in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)) if SLOT in t.user_attrs]


def write_results(result: SweepResult, out: Path) -> list[Path]:
    """Writes the table, every run as CSV and as JSON lines, and the picture into the sweep's folder; writes nothing if
    no trial is finished.

    Returns:
        The files that were written. The picture is left out if every loss is NaN or infinite.
    """
    if not result.finished:
        return []
    out.mkdir(parents=True, exist_ok=True)
    rows = _rows(result.finished)
    write_text(out / LINES, "".join(json.dumps(row) + "\n" for row in rows))
    write_text(out / CSV, _csv(rows))
    head, lines = summary(result.finished)
    text = [_markdown_row(head), _markdown_row(["---"] * len(head)), *map(_markdown_row, lines)]
    notes = ["", "Means over seeds, with standard deviations for several seeds.", f"{conclusion(result)}."]
    notes += [f"- stopped early: {label}" for label in result.pruned]
    notes += [f"- failed: {label}: {message}" for label, message in result.failures]
    write_text(out / TABLE, "\n".join([*text, *notes]) + "\n")
    files = [out / TABLE, out / CSV, out / LINES]
    points = result.points()
    if any(math.isfinite(point.loss) and math.isfinite(point.size) for point in points):
        first, second = result.axes
        several = len(result.finished[0].runs) > 1
        picture = pareto_picture(
            points,
            out / PICTURE,
            size="trainable parameters at the end" if second == PARAMETERS else second,
            loss=f"{first}, mean and standard deviation over seeds" if several else first,
            title=f"{result.sweep.name}: {first} against {second}, {_count(len(points), 'setting')}",
        )
        files.append(picture)
    return files


def conclusion(result: SweepResult) -> str:
    """The best setting in words; with two objectives, the Pareto front."""
    first, second = result.axes
    if result.best is None:
        return f"No trial has a finite {first}"
    if len(result.sweep.file.objectives) == 1:
        best, name = result.best, OBJECTIVES[result.sweep.file.objectives[0]]
        return f"Lowest {name}: {_number(best.mean(name))} with {best.label} ({best.mean(PARAMETERS):,.0f} parameters)"
    return f"Pareto front of {second} and {first}: " + "; ".join(
        f"{trial.label} ({_number(trial.mean(second))}, {_number(trial.mean(first))})" for trial in result.front
    )


def summary(finished: Sequence[Finished]) -> tuple[list[str], list[list[str]]]:
    """The head and the rows of the table, one row per setting, as text."""
    keys = _in_order(key for trial in finished for key in trial.settings)
    columns = _in_order(name for trial in finished for run in trial.runs for name in run.figures)
    head = [*keys, "seeds", *columns]
    rows = [
        [
            *(_cell(trial.settings.get(key, "")) for key in keys),
            ", ".join(str(run.seed) for run in trial.runs),
            *(_mean([run.figures[name] for run in trial.runs if name in run.figures]) for name in columns),
        ]
        for trial in finished
    ]
    return head, rows


def rich_table(finished: Sequence[Finished], title: str) -> Table:
    """The same table for a terminal."""
    head, rows = summary(finished)
    table = Table(title=title)
    for number, name in enumerate(head):
        table.add_column(name, justify="left" if number == 0 else "right")
    for row in rows:
        table.add_row(*row)
    return table


def as_json(result: SweepResult, study: str, url: str, files: Sequence[Path]) -> dict[str, Any]:
    """The result for scripts."""

    def one(trial: Finished) -> dict[str, Any]:
        names = _in_order(name for run in trial.runs for name in run.figures)
        return {
            "trial": trial.number,
            "settings": dict(trial.settings),
            "seeds": [run.seed for run in trial.runs],
            "folders": [run.folder for run in trial.runs],
            "means": {name.replace(" ", "_"): _plain(trial.mean(name)) for name in names},
        }

    return {
        "study": study,
        "storage": url,
        "output_dir": str(result.sweep.out),
        "sampler": result.sweep.file.sampler,
        "objectives": list(result.sweep.file.objectives),
        "trials": {
            "asked": result.sweep.count,
            "finished": len(result.finished),
            "new": result.new,
            "stopped_early": len(result.pruned),
            "failed": len(result.failures),
            "unfinished": result.unfinished,
        },
        "best": one(result.best) if result.best else None,
        "pareto_front": [one(trial) for trial in result.front],
        "results": [one(trial) for trial in result.finished],
        "failures": [{"settings": label, "error": message} for label, message in result.failures],
        "files": [str(file) for file in files],
    }


def stored(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Runs as JSON values; NaN and infinity, which JSON does not have, become null."""
    return [
        {"seed": run.seed, "folder": run.folder, "figures": {k: _plain(v) for k, v in run.figures.items()}}
        for run in runs
    ]


def _finished(trial: FrozenTrial, sweep: Sweep) -> Finished:
    runs = [
        Run(run["seed"], run["folder"], {k: math.nan if v is None else v for k, v in run["figures"].items()})
        for run in trial.user_attrs[RUNS]
    ]
    return Finished(trial.number, trial.user_attrs[SLOT], _settings(trial, sweep), runs)


def _settings(trial: FrozenTrial, sweep: Sweep) -> dict[str, Any]:
    """The settings of a trial in the order of the file; those that it was given in the queue, if it has no others."""
    given = {**trial.system_attrs.get("fixed_params", {}), **trial.params}
    return {key: values.value(given[key]) for key, values in sweep.space.items() if key in given}


def _number(value: float) -> str:
    return f"{value:,.0f}" if value.is_integer() or abs(value) >= 1000 else f"{value:.4f}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' if number != 1 else ''}"


def _order(value: float) -> tuple[bool, float]:
    return (math.isnan(value), value)


def _plain(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _rows(finished: Sequence[Finished]) -> list[dict[str, Any]]:
    return [
        {
            "trial": trial.number,
            **trial.settings,
            "seed": run.seed,
            **{name: _plain(value) for name, value in run.figures.items()},
            "folder": run.folder,
        }
        for trial in finished
        for run in trial.runs
    ]


def _csv(rows: Sequence[Mapping[str, Any]]) -> str:
    file = io.StringIO()
    writer = csv.DictWriter(file, _in_order(key for row in rows for key in row), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _mean(values: Sequence[float]) -> str:
    if not values:
        return ""
    mean = statistics.fmean(values)
    if all(float(value).is_integer() for value in values):
        return f"{mean:,.0f}"
    text = f"{mean:.0f}" if abs(mean) >= 1000 else f"{mean:.4g}"
    return f"{text} ± {statistics.stdev(values):.2g}" if len(values) > 1 else text


def _in_order(labels: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(labels))


def _markdown_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
