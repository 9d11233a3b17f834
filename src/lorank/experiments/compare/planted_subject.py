"""Comparisons on problems whose true ranks are known (docs/planted.md): the budget is the number of planted ranks.

The methods, their settings and their grids are those of `lorank planted`, and so are the lines of results: a folder can
be used by both commands. Every seed is a problem of its own, with other text, so examples are not resampled.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Any

from lorank.experiments.compare.file import Comparison
from lorank.experiments.compare.subject import Entry, Subject
from lorank.experiments.planted.methods import METHODS, method_of
from lorank.experiments.planted.problem import Scenario, make_problem
from lorank.experiments.planted.student import train_student
from lorank.experiments.planted.study import RUNS, check_methods, contender, run_trial
from lorank.experiments.study.trials import Line
from lorank.experiments.study.tuning import Stage

BUDGET = "the planted ranks"


def planted_subject(comparison: Comparison) -> Subject:
    """The methods of the file as contenders on planted problems.

    Raises:
        PlantedError: a method is unknown, or not for this scenario.
    """
    file = comparison.file
    scenario = Scenario(**file.planted.model_dump())
    check_methods(scenario, list(file.methods))
    entries = [Entry(name, METHODS[name].title, BUDGET, contender(scenario, name), None) for name in file.methods]
    made = {entry.method: entry.contender for entry in entries}
    for k in sorted(file.references):
        name = "uniform" if k == 1 else f"uniform*{k:g}"
        one = made.get(name) or contender(scenario, name)
        entries.append(Entry(f"LoRA × {k:g}", method_of(name).title, BUDGET, one, None, k))
    return Subject(
        task=f"planted {scenario.where}",
        metric="loss",
        higher_is_better=False,
        budgets=[BUDGET],
        entries=entries,
        work=run_trial,
        file=RUNS,
        value=_value,
        examples=lambda line: None,
        tidy=_tidy,
        estimate=partial(_seconds_per_run, scenario, file.tuning_seeds[0]),
    )


def _value(line: Line) -> float:
    return math.nan if line["test"] is None else float(line["test"])


def _tidy(entry: Entry, stage: Stage, line: Line) -> dict[str, Any]:
    most, final = line.get("parameters", (None, None))
    return {
        "fingerprint": line["fingerprint"],
        "task": f"planted {line['scenario']}",
        "method": entry.method,
        "budget": entry.budget,
        "reference": entry.reference,
        "lr": line["lr"],
        "knob": line["knob"],
        "seed": line["seed"],
        "stage": stage,
        "failure": line["failure"],
        "validation_loss": line["selection"],
        "test_loss": line["test"],
        "parameters": final,
        "most_parameters": most,
        "overlap": line.get("overlap"),
        "seconds": line.get("seconds"),
        "allocation_seconds": line.get("scoring"),
        "ranks": line.get("ranks"),
    }


def _seconds_per_run(scenario: Scenario, seed: int, steps: int = 20) -> float:
    """An estimate from a few steps of LoRA with even ranks."""
    problem = make_problem(replace(scenario, steps=steps), seed)
    method = METHODS["uniform"]
    outcome = train_student(problem, method.ranks(problem), method.allocator(problem, None), lr=1e-3)
    return outcome.seconds / steps * scenario.steps
