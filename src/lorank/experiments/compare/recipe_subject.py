"""Comparisons on the task of a recipe: every method at every budget gets a whole configuration.

All methods end with as many numbers in A and B as LoRA of even ranks has at the budget. A method that prunes begins
wider; the factor s of the update is the base's for all of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from lorank.allocators.budget import Budget
from lorank.config.settings import ALLOCATORS, ConfigError, FullSettings, RunConfig, make_config
from lorank.experiments.compare.contenders import Contenders, Size
from lorank.experiments.compare.file import Comparison, MethodKeys
from lorank.experiments.compare.recipe_runs import (
    LOSSES,
    other_task,
    run_trial,
    seconds_per_run,
    task_of,
)
from lorank.experiments.compare.statistics import Examples, grouped
from lorank.experiments.compare.subject import Entry, Subject
from lorank.experiments.errors import SettingsError
from lorank.experiments.study.trials import Line
from lorank.experiments.study.tuning import Contender, Stage
from lorank.tasks import Task

RESULTS = "results.jsonl"
_METRICS = {
    "generation": ("loss", "bleu", "rouge_l"),
    "classification": ("loss", "accuracy"),
    "image_classification": ("loss", "accuracy"),
    "language_modelling": ("loss", "perplexity"),
}
_LOWER_IS_BETTER = ("loss", "perplexity")


def recipe_subject(comparison: Comparison) -> Subject:
    """Checks a comparison against its model and its data, and makes the configurations of all methods.

    Raises:
        ConfigError: a configuration is wrong, a method has no budget, or the task does not have the metric.
        LorankError: the model or the data cannot be loaded, or a budget does not fit the model.
    """
    file = comparison.file
    configs = _configurations(comparison)
    first = next(iter(configs.values()))
    task = task_of(first)
    _check_metric(comparison, first, task)
    budgets = {budget_label(spec): Budget.parse(spec) for spec in file.budgets}
    plain, contenders = _plain(comparison), Contenders(file, task)
    entries: list[Entry] = []
    for label, budget in budgets.items():
        _, parameters = contenders.layers.even(plain, budget)
        made: dict[str, Contender] = {}
        for name in sorted(configs, key=lambda name: comparison.methods[name][0].ranks_of is not None):
            size = Size(label, parameters, budget.max_lora_rank)
            made[name] = contenders.of(configs[name], name, comparison.methods[name][0], size, made)
        for name, config in configs.items():
            full = isinstance(config.allocator, FullSettings)
            title = comparison.methods[name][0].title or name
            entries.append(Entry(name, title, label, made[name], None if full else parameters, sized=not full))
        for k in sorted(file.references):
            size = Size(label, round(k * parameters))
            name = f"LoRA × {k:g}"
            contender = contenders.of(plain, name, MethodKeys(), size, {})
            entries.append(Entry(name, name, label, contender, size.parameters, k))
    return Subject(
        task=first.task.data,
        metric=file.metric,
        higher_is_better=file.metric not in _LOWER_IS_BETTER,
        budgets=list(budgets),
        entries=entries,
        work=partial(run_trial, out=Path(file.output_dir)),
        file=RESULTS,
        value=partial(_value, metric=file.metric),
        examples=partial(_examples, metric=file.metric, out=Path(file.output_dir)),
        tidy=_tidy,
        estimate=partial(seconds_per_run, plain),
    )


def budget_label(spec: Any) -> str:
    """A budget as it is told to users."""
    if isinstance(spec, Mapping):
        return ", ".join(f"{key.replace('_', ' ')} {value:g}" for key, value in spec.items())
    return f"{spec:g} per module" if isinstance(spec, int | float) else str(spec)


def _configurations(comparison: Comparison) -> dict[str, RunConfig]:
    made, wrong = {}, []
    for name, (_, values) in comparison.methods.items():
        try:
            config = make_config(values, source=f"methods.{name}")
        except ConfigError as error:
            wrong.append(str(error))
            continue
        section = ALLOCATORS.get(config.allocator.name)
        if section is None:  # full fine-tuning, which is shown beside the methods
            made[name] = config
            continue
        if "budget" not in section.model_fields:
            wrong.append(f"methods.{name}: {config.allocator.name} has no setting budget, so it cannot be held to one")
        made[name] = config
    for spec in comparison.file.budgets:
        try:
            Budget.parse(spec)
        except ValueError as error:  # BudgetError is one
            wrong.append(f"budgets: {error}")
    if wrong:
        raise ConfigError(f"{comparison.name}:\n" + "\n".join(f"  {line}" for line in dict.fromkeys(wrong)))
    return made


def _plain(comparison: Comparison) -> RunConfig:
    """The base with ranks that do not move, for references."""
    assert comparison.base is not None
    return make_config({**comparison.base, "allocator": {"name": "static"}}, source="base")


def _check_metric(comparison: Comparison, config: RunConfig, task: Task) -> None:
    known = _METRICS[config.task.name]
    if comparison.file.metric not in known:
        raise ConfigError(
            f"{comparison.name}: metric {comparison.file.metric!r}: the task {config.task.name} has {', '.join(known)}"
        )
    if not task.has_test:
        raise SettingsError(
            f"{comparison.name}: the task has no test split, and methods are compared on test data alone: name a "
            "test_split"
        )
    _ = task.test  # report a missing split or column now
    other = comparison.file.forgetting
    if other is None:
        return
    kind = other_task(config, other.model_dump_json()).model_kind
    if kind != task.model_kind:
        raise ConfigError(
            f"{comparison.name}: forgetting is a task for a model of the kind {kind}, and the base trains a "
            f"{task.model_kind}: the same model must do both"
        )


def _value(line: Line, *, metric: str) -> float:
    value = line["test"].get(metric)
    return math.nan if value is None else float(value)


def _examples(line: Line, *, metric: str, out: Path) -> Examples | None:
    """By group of examples with one prompt: summed losses and labels, or right answers and examples."""
    path = out / LOSSES / f"{line['fingerprint']}.npz"
    if metric not in ("loss", "accuracy") or not path.is_file():
        return None
    with np.load(path) as file:
        values, groups = file["losses" if metric == "loss" else "correct"], file["groups"]
        counts = file["labels"] if metric == "loss" else np.ones_like(values)
    return grouped(values, counts, groups)


def _tidy(entry: Entry, stage: Stage, line: Line) -> dict[str, Any]:
    """A line of results as a row of a table."""
    return {
        **{key: value for key, value in line.items() if key not in ("test", "ranks", "method", "budget", "stage")},
        "method": entry.method,
        "budget": entry.budget,
        "reference": entry.reference,
        "stage": stage,
        **{f"test_{name}": value for name, value in line["test"].items()},
        "ranks": line.get("ranks"),
    }
