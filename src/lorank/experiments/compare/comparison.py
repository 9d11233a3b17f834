"""Runs a comparison, and says what came out: one row per method and budget, each with a sentence."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lorank.experiments.compare.file import Comparison
from lorank.experiments.compare.statistics import (
    FEW_SEEDS,
    Difference,
    Equivalent,
    equivalent_size,
    mean_and_error,
    paired_bootstrap,
    sentence,
)
from lorank.experiments.compare.subject import Entry, Subject
from lorank.experiments.study.trials import Line, Progress, Results, Trial, Wanted, run_trials
from lorank.experiments.study.tuning import Setting, Stage, study_plan, trial_of, tune

TOLERANCE = 0.02
"""Final sizes that differ from the budget by more are told."""


def make_subject(comparison: Comparison) -> Subject:
    """What a comparison is about, checked against its model and its data."""
    if comparison.base is None:
        from lorank.experiments.compare.planted_subject import planted_subject

        return planted_subject(comparison)
    from lorank.experiments.compare.recipe_subject import recipe_subject

    return recipe_subject(comparison)


def results_of(comparison: Comparison, subject: Subject) -> Results:
    """The file of the comparison's lines."""
    return Results(Path(comparison.file.output_dir) / subject.file)


def wanted_runs(comparison: Comparison, subject: Subject, known: Mapping[str, Line]) -> Wanted:
    """The runs of a comparison, as far as the lines that are known decide them."""
    file = comparison.file
    return study_plan(subject.contenders, tuning_seeds=file.tuning_seeds, seeds=file.seeds)(known)


def run_comparison(
    comparison: Comparison,
    subject: Subject,
    *,
    jobs: int = 1,
    devices: Sequence[str] = (),
    report: Callable[[Progress], None] | None = None,
) -> dict[str, Line]:
    """Does all runs that are not finished. See :func:`lorank.experiments.study.trials.run_trials`.

    Returns:
        All lines of the folder's file, by fingerprint.
    """
    return run_trials(
        study_plan(subject.contenders, tuning_seeds=comparison.file.tuning_seeds, seeds=comparison.file.seeds),
        subject.work,
        results_of(comparison, subject),
        jobs=jobs,
        devices=devices,
        report=report,
    )


def assess(comparison: Comparison, subject: Subject, known: Mapping[str, Line]) -> dict[str, Any]:
    """The content of comparison.json. Every number is finite or None.

    Args:
        comparison: the file.
        subject: what it is about.
        known: the lines of all its runs.
    """
    rows = []
    for budget in subject.budgets:
        found = {
            entry.method: _Found(entry, subject, comparison, known)
            for entry in subject.entries
            if entry.budget == budget
        }
        baseline = found[comparison.file.baseline or next(iter(found))]
        references = [(one.entry.reference, one.mean) for one in found.values() if one.entry.reference is not None]
        rows += [_row(one, baseline, references, subject) for one in found.values() if one.entry in subject.shown]
    summary = _summary(rows, subject, baseline.entry.title, len(comparison.file.seeds))
    result: dict[str, Any] = _finite(
        {
            "name": comparison.name,
            "quick": comparison.quick,
            "task": subject.task,
            "metric": subject.metric,
            "higher_is_better": subject.higher_is_better,
            "baseline": comparison.file.baseline,
            "budgets": list(subject.budgets),
            "tuning_seeds": comparison.file.tuning_seeds,
            "rows": rows,
            "sentence": ("A quick look, not a result: fewer rates, seeds and steps. " if comparison.quick else "")
            + summary,
        }
    )
    return result


def tidy_rows(comparison: Comparison, subject: Subject, known: Mapping[str, Line]) -> list[dict[str, Any]]:
    """One row per run, for tables: an entry's tuning runs, then its test runs."""
    file, rows = comparison.file, []
    for entry in subject.shown:
        tuned = tune(entry.contender, file.tuning_seeds, known)
        asked: list[tuple[Setting, int, Stage]] = [
            (s, seed, "tuning") for s in tuned.asked for seed in file.tuning_seeds
        ]
        if tuned.best is not None:
            asked += [(tuned.best, seed, "test") for seed in file.seeds]
        for setting, seed, stage in asked:
            trial = trial_of(entry.contender, setting, seed, stage, tuning_seeds=file.tuning_seeds, known=known)
            if trial is not None and trial.fingerprint in known:
                rows.append(subject.tidy(entry, stage, known[trial.fingerprint]))
    return rows


class _Found:
    """The finished runs of one entry."""

    def __init__(self, entry: Entry, subject: Subject, comparison: Comparison, known: Mapping[str, Line]) -> None:
        self.entry, self.seeds = entry, comparison.file.seeds
        self.tuned = tune(entry.contender, comparison.file.tuning_seeds, known)
        assert self.tuned.best is not None  # all runs are finished
        self.best = self.tuned.best
        self.lines = [known[self._trial(seed, comparison, known).fingerprint] for seed in self.seeds]
        self.rows = [subject.tidy(entry, "test", line) for line in self.lines]
        self.values = [subject.value(line) for line in self.lines]
        self.mean, self.error = mean_and_error(self.values)
        examples = [subject.examples(line) for line in self.lines]
        self.examples = None if any(one is None for one in examples) else [one for one in examples if one is not None]

    def _trial(self, seed: int, comparison: Comparison, known: Mapping[str, Line]) -> Trial:
        tuning_seeds = comparison.file.tuning_seeds
        trial = trial_of(self.entry.contender, self.best, seed, "test", tuning_seeds=tuning_seeds, known=known)
        assert trial is not None  # all runs are finished
        return trial

    def mean_of(self, column: str) -> float | None:
        found = [row[column] for row in self.rows if row.get(column) is not None]
        return statistics.fmean(found) if found else None


def _row(
    found: _Found, baseline: _Found, references: Sequence[tuple[float, float]], subject: Subject
) -> dict[str, Any]:
    entry = found.entry
    difference: Difference | None = None
    equivalent = equivalent_size(found.mean, references, higher_is_better=subject.higher_is_better)
    if found is not baseline:
        both = found.examples is not None and baseline.examples is not None
        difference = paired_bootstrap(
            found.values,
            baseline.values,
            found.examples if both else None,
            baseline.examples if both else None,
        )
    parameters = found.mean_of("parameters")
    return {
        "method": entry.method,
        "title": entry.title,
        "budget": entry.budget,
        "reference": entry.reference,
        "sized": entry.sized,
        "lr": found.best[0],
        "lr_grid": {_setting(setting): loss for setting, loss in sorted(found.tuned.losses.items(), key=_by_rate)},
        "seeds": list(found.seeds),
        "values": found.values,
        "mean": found.mean,
        "stderr": found.error,
        "parameters": None if parameters is None else round(parameters),
        "most_parameters": found.mean_of("most_parameters"),
        "seconds": found.mean_of("seconds"),
        "untrained_loss": found.mean_of("untrained_loss"),
        "other_loss_before": found.mean_of("other_loss_before"),
        "other_loss": found.mean_of("other_loss"),
        "allocation_seconds": found.mean_of("allocation_seconds"),
        "difference": None if difference is None else vars(difference) | {"real": difference.real},
        "equivalent_k": equivalent.k,
        "sentence": _told(found, baseline, difference, equivalent, subject),
        "notes": _notes(found, parameters),
    }


def _told(
    found: _Found, baseline: _Found, difference: Difference | None, equivalent: Equivalent, subject: Subject
) -> str:
    title, metric = found.entry.title, subject.metric.replace("_", " ")
    if difference is not None:
        return sentence(
            title,
            baseline.entry.title,
            difference,
            seeds=len(found.seeds),
            metric=metric,
            higher_is_better=subject.higher_is_better,
            equivalent=equivalent,
        )
    if not math.isfinite(found.mean):
        return f"{title}, the baseline: a run failed."
    error = f" ± {found.error:.2g}" if math.isfinite(found.error) else ""
    return f"{title}, the baseline: {metric} {found.mean:.4g}{error}."


def _notes(found: _Found, parameters: float | None) -> list[str]:
    notes = []
    wanted = found.entry.parameters
    if not found.entry.sized:
        notes.append("trains all weights of the model, so it is not of the budget's size")
    if wanted is not None and parameters is not None and abs(parameters / wanted - 1) > TOLERANCE:
        notes.append(
            f"ends with {parameters:,.0f} parameters, {abs(parameters / wanted - 1):.1%} "
            f"{'fewer' if parameters < wanted else 'more'} than the budget's {wanted:,}: not of equal size"
        )
    if found.tuned.capped:
        notes.append(
            f"its best learning rate, {found.best[0]:g}, is at an end of the grid, which may not grow any more: a "
            "better one may exist (raise growth)"
        )
    failed = [
        f"seed {seed}: {row['failure']}" for seed, row in zip(found.seeds, found.rows, strict=True) if row["failure"]
    ]
    return [*notes, *(f"failed, {why}" for why in failed)]


def _summary(rows: Sequence[Mapping[str, Any]], subject: Subject, baseline: str, seeds: int) -> str:
    parts = []
    for budget in subject.budgets:
        methods = [row for row in rows if row["budget"] == budget and row["reference"] is None and row["sized"]]
        measured = [row for row in methods if math.isfinite(row["mean"])]
        if not measured:
            parts.append(f"{budget}: every method failed.")
            continue
        best = (max if subject.higher_is_better else min)(measured, key=lambda row: row["mean"])
        told = f"{budget}: {best['title']} is best ({subject.metric.replace('_', ' ')} {best['mean']:.4g})"
        groups: dict[str, list[str]] = {"better": [], "worse": [], "not shown to differ": []}
        for row in measured:
            if row["difference"] is not None:
                better = (row["difference"]["mean"] > 0) == subject.higher_is_better
                key = ("better" if better else "worse") if row["difference"]["real"] else "not shown to differ"
                groups[key].append(row["title"])
        told += "".join(f"; {key}: {', '.join(titles)}" for key, titles in groups.items() if titles)
        parts.append(f"{told}." if len(measured) > 1 else f"{told}; nothing to compare with.")
    text = f"Against {baseline}, at equal size. " + " ".join(parts)
    if seeds < FEW_SEEDS:
        text += f" Fewer than {FEW_SEEDS} seeds: the intervals are not trustworthy."
    return text


def _by_rate(item: tuple[tuple[float, Any], float]) -> tuple[float, str]:
    return item[0][0], str(item[0][1])


def _setting(setting: tuple[float, Any]) -> str:
    lr, knob = setting
    return f"{lr:g}" if knob is None else f"{lr:g}, {knob:g}"


def _finite(value: Any) -> Any:
    """The same nested value, with None for NaN and infinite numbers, which JSON does not have."""
    if isinstance(value, Mapping):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
