"""The settings that a sweep tries: lists of values and ranges, by dotted key."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import yaml
from pydantic import Field, ValidationError, model_validator
from typing_extensions import Self

from lorank.tasks.settings import Settings

if TYPE_CHECKING:
    from optuna.trial import Trial

Scalar = str | int | float | bool | None
VARIANT = "variant"
"""The name of the parameter that chooses between the named variants."""


@dataclass(frozen=True)
class Choice:
    """A list of values.

    Args:
        values: the values as the configuration takes them: also lists and mappings.
    """

    values: tuple[Any, ...]

    @cached_property
    def stored(self) -> tuple[Scalar, ...]:
        """The values as Optuna stores them. Lists and mappings become YAML text; so does everything if two values are
        equal in Python, as 1 and true are."""
        plain = all(v is None or isinstance(v, str | int | float) for v in self.values)
        plain = plain and not any(isinstance(v, float) and math.isnan(v) for v in self.values)
        return self.values if plain and len(set(self.values)) == len(self.values) else tuple(map(as_yaml, self.values))

    def suggest(self, trial: Trial, name: str) -> None:
        """Sets the parameter of an Optuna trial, unless the trial has it."""
        trial.suggest_categorical(name, self.stored)

    def value(self, stored: Scalar) -> Any:
        """The configuration's value."""
        return self._by_stored[stored]

    @cached_property
    def _by_stored(self) -> dict[Scalar, Any]:
        return dict(zip(self.stored, self.values, strict=True))

    @property
    def extremes(self) -> tuple[Any, ...]:
        return self.values


class Range(Settings):
    """A range of numbers, both ends included; of whole numbers if both ends are."""

    low: int | float
    """The least value."""
    high: int | float
    """The largest value."""
    log: bool = False
    """Draw the logarithm evenly, as for a learning rate."""
    step: int | float | None = Field(default=None, gt=0)
    """The distance between values; null: every number."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.high <= self.low:
            raise ValueError(f"high must be above low, given low {self.low} and high {self.high}")
        if self.log and self.low <= 0:
            raise ValueError(f"low must be above 0 if log is true, given {self.low}")
        if self.log and self.step is not None:
            raise ValueError("log and step exclude each other: give one of them")
        if self._whole and not isinstance(self.step, int | None):
            raise ValueError(f"step must be whole if both ends are, given {self.step}")
        return self

    @property
    def _whole(self) -> bool:
        return isinstance(self.low, int) and isinstance(self.high, int)

    def suggest(self, trial: Trial, name: str) -> None:
        """Sets the parameter of an Optuna trial, unless the trial has it."""
        if self._whole:
            trial.suggest_int(name, int(self.low), int(self.high), log=self.log, step=int(self.step or 1))
        else:
            trial.suggest_float(name, self.low, self.high, log=self.log, step=self.step)

    def value(self, stored: Scalar) -> Any:
        """The configuration's value: the number itself."""
        return stored

    @property
    def extremes(self) -> tuple[Any, ...]:
        return (self.low, self.high)


Dimension = Choice | Range


def read_dimension(given: Any) -> Dimension:
    """A list of values or a range, as the YAML file gives it.

    Raises:
        ValueError: it is neither, the list is empty, or the range is wrong.
    """
    example = "a list of values, or a range such as {low: 0.0001, high: 0.01, log: true}"
    if isinstance(given, list):
        if not given:
            raise ValueError(f"has no values: give {example}")
        if len(set(map(as_yaml, given))) < len(given):
            raise ValueError(f"a value occurs twice: {given}")
        return Choice(tuple(given))
    if isinstance(given, dict):
        try:
            return Range.model_validate(given)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            key = str(first["loc"][0]) if first["loc"] else ""
            said = first["msg"].removeprefix("Value error, ")
            raise ValueError(f"{f'{key}: ' if key else ''}{said}; expected {example}") from error
    raise ValueError(f"expected {example}; given {given!r}")


def combinations(space: Mapping[str, Dimension]) -> list[dict[str, Scalar]]:
    """Every combination of a space of lists, as stored values. The last key changes fastest."""
    lists = [choice.stored for choice in space.values() if isinstance(choice, Choice)]
    return [dict(zip(space, values, strict=True)) for values in itertools.product(*lists)]


def size(space: Mapping[str, Dimension]) -> int:
    """The number of combinations of a space of lists."""
    return math.prod(len(choice.values) for choice in space.values() if isinstance(choice, Choice))


def as_yaml(value: Any) -> str:
    """A value as text for an override. Unlike str(), it keeps 1e-05 a number."""
    return yaml.safe_dump(value, default_flow_style=True, width=10**9).removesuffix("...\n").strip()
