"""What a comparison is about: its contenders, how a trial is done, and what its lines of results mean."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lorank.experiments.compare.statistics import Examples
from lorank.experiments.study.trials import Line
from lorank.experiments.study.tuning import Contender, Stage


@dataclass(frozen=True)
class Entry:
    """One row of a comparison: a method at a budget, or LoRA of another size as a reference.

    Args:
        method: its key in the file.
        title: its name in tables.
        budget: the budget as it is told to users.
        contender: its trials. Entries with the same configuration share one, so that no run is done twice.
        parameters: the numbers in A and B that the budget buys; None: it differs between seeds.
        reference: k, for LoRA with k times the parameters; None: one of the methods.
        sized: whether it is of the budget's size; full fine-tuning is not.
    """

    method: str
    title: str
    budget: str
    contender: Contender
    parameters: int | None
    reference: float | None = None
    sized: bool = True


@dataclass(frozen=True)
class Subject:
    """A comparison that is ready to run.

    Args:
        task: the name of the task or data set.
        metric: the test metric that is compared.
        higher_is_better: its direction.
        budgets: as they are told to users.
        entries: all rows, by budget, the methods before the references.
        work: does one trial; it can be pickled.
        file: the name of the file of results.
        value: the metric in the line of a test run; NaN for a run that failed.
        examples: the metric's values by test example, for the line's run; None: not kept for this metric.
        tidy: a line as a row of a table: plain values, and ``ranks`` by module.
        estimate: measures how long one run takes, in seconds.
    """

    task: str
    metric: str
    higher_is_better: bool
    budgets: Sequence[str]
    entries: Sequence[Entry]
    work: Callable[[Any], Mapping[str, Any]]
    file: str
    value: Callable[[Line], float]
    examples: Callable[[Line], Examples | None]
    tidy: Callable[[Entry, Stage, Line], dict[str, Any]]
    estimate: Callable[[], float]

    @property
    def shown(self) -> list[Entry]:
        """The entries of tables: without references that are one of the methods at the same budget."""
        methods = {(e.budget, id(e.contender)) for e in self.entries if e.reference is None}
        return [e for e in self.entries if e.reference is None or (e.budget, id(e.contender)) not in methods]

    @property
    def contenders(self) -> list[Contender]:
        """Every contender once."""
        return list({id(entry.contender): entry.contender for entry in self.entries}.values())
