"""The YAML file of a sweep. It is checked before anything slow is imported."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, ValidationError, model_validator
from typing_extensions import Self

from lorank.config.errors import ConfigError, explain
from lorank.config.recipes import PATHS, absolute_path, find_file, with_absolute_paths
from lorank.config.yaml_files import apply_overrides, parse_yaml, read_yaml
from lorank.experiments.sweep.space import VARIANT, Choice, Dimension, Range, read_dimension
from lorank.tasks.settings import Settings

Objective = Literal["validation_loss", "parameters", "total_rank", "training_seconds"]
OUTPUT_DIR = "output_dir"


class SweepFile(Settings):
    """The content of a sweep's YAML file."""

    base: str | dict[str, Any]
    """A recipe: its name, or the path of a YAML file, relative to the sweep's file; or a whole configuration."""
    changes: dict[str, Any] = Field(default_factory=dict)
    """Dotted keys of the configuration with their values, for every trial."""
    variants: dict[str, dict[str, Any]] = Field(default={"": {}}, min_length=1)
    """Named settings: dotted keys of the configuration with their values."""
    space: dict[str, Any] = Field(default_factory=dict)
    """Dotted keys of the configuration, each with a list of values or a range {low, high, log, step}."""
    sampler: Literal["grid", "random", "tpe"] = "grid"
    """grid: every combination of the lists. random, tpe: as many trials as `trials`; tpe learns from earlier trials."""
    trials: int | None = Field(default=None, ge=1)
    """The number of trials of random and tpe."""
    objectives: list[Objective] = Field(default=["validation_loss"], min_length=1, max_length=2)
    """What the sweep makes small, each as a mean over the seeds; two objectives give a Pareto front."""
    pruner: Literal["none", "median"] = "none"
    """median: stop a trial whose validation loss, after half of its steps, is worse than the median of the others."""
    seeds: list[int] = Field(default_factory=list)
    """Seeds (`training.seed`) of every setting; empty: the seed of the base."""
    sampler_seed: int = Field(default=0, ge=0)
    """Seed of random and tpe."""
    output_dir: str = Field(min_length=1)
    """The folder for all runs and the results."""

    @property
    def dimensions(self) -> dict[str, Dimension]:
        """What differs between trials, by Optuna's name for it: the variant, if there are several or it has a name,
        and the keys of the space."""
        named = {VARIANT: Choice(tuple(self.variants))} if set(self.variants) != {""} else {}
        return {**named, **{key: read_dimension(given) for key, given in self.space.items()}}

    @model_validator(mode="after")
    def _check(self) -> Self:
        wrong = []
        dimensions: dict[str, Dimension] = {}
        for key, given in self.space.items():
            try:
                dimensions[key] = read_dimension(given)
            except ValueError as error:
                wrong.append(f"space.{key}: {error}")
        ranges = [key for key, given in dimensions.items() if isinstance(given, Range)]
        if self.sampler == "grid":
            if ranges:
                wrong.append(
                    f"space.{ranges[0]} is a range, and sampler grid needs a list of values: give the list, or "
                    "sampler: tpe and trials: 30"
                )
            if self.trials is not None:
                wrong.append("trials is for the samplers random and tpe; grid runs every combination: leave it out")
        elif self.trials is None:
            wrong.append(f"sampler {self.sampler} needs the number of trials, such as trials: 30")
        for name, values in (("seeds", self.seeds), ("objectives", self.objectives)):
            if len(set(values)) < len(values):
                wrong.append(f"{name}: a value occurs twice: {values}")
        if self.pruner != "none" and self.objectives != ["validation_loss"]:
            wrong.append("pruner median needs the validation loss as the only objective")
        wrong += self._wrong_keys()
        if wrong:
            raise ValueError("; ".join(wrong))
        return self

    def _wrong_keys(self) -> list[str]:
        wrong = []
        for name, changes in self.variants.items():
            wrong += [
                f"{key} is in the space and in the variant {name!r}: give it in only one"
                for key in sorted(set(changes) & set(self.space))
            ]
        changed = {*self.changes, *self.space, *itertools.chain(*self.variants.values())}
        instead = {OUTPUT_DIR: OUTPUT_DIR, "training.seed": "seeds"}
        wrong += [
            f"{key} cannot be set in changes, variants or space: use the sweep's own key {own}"
            for key, own in instead.items()
            if key in changed
        ]
        if VARIANT in self.space:
            wrong.append(f"space.{VARIANT}: there is no such key of a configuration")
        return wrong


def split_overrides(overrides: Sequence[str]) -> tuple[list[str], list[str]]:
    """The overrides of the sweep itself (`trials=10`, `space.lora.r=[1, 2]`), and those for every run."""
    own = [text for text in overrides if text.partition("=")[0].strip().partition(".")[0] in SweepFile.model_fields]
    return own, [text for text in overrides if text not in own]


def read_sweep(path: str | Path, overrides: Sequence[str] = ()) -> tuple[SweepFile, dict[str, Any]]:
    """Reads the file of a sweep and its base. Relative paths in a file start from the folder of that file.

    Args:
        path: the YAML file, or the name of a sweep in the package.
        overrides: those of the sweep itself, from :func:`split_overrides`.

    Returns:
        The sweep, and the values of its base configuration.

    Raises:
        ConfigError: a file does not exist or is not YAML, or the sweep has unknown keys or wrong values.
    """
    file = find_file(path)
    values = read_yaml(file)
    if "grid" in values and "space" not in values:
        raise ConfigError(f"{path}: grid: unknown key; did you mean space?")
    values |= _own(values, overrides, file)
    try:
        sweep = SweepFile.model_validate(values)
    except ValidationError as error:
        raise ConfigError(explain(error, SweepFile, str(path))) from error
    here = file.parent
    sweep = sweep.model_copy(
        update={
            "changes": _absolute(sweep.changes, here),
            "variants": {name: _absolute(changes, here) for name, changes in sweep.variants.items()},
            "space": {
                key: [_absolute({key: value}, here)[key] for value in given] if isinstance(given, list) else given
                for key, given in sweep.space.items()
            },
        }
    )
    if isinstance(sweep.base, dict):
        return sweep, with_absolute_paths(sweep.base, here)
    try:
        base = find_file(sweep.base, beside=here)
    except ConfigError as error:
        raise ConfigError(f"{file}: base: {error}") from error
    return sweep, with_absolute_paths(read_yaml(base), base.parent)


def _own(values: Mapping[str, Any], overrides: Sequence[str], file: Path) -> dict[str, Any]:
    """The sweep's own keys that overrides change; references in the output folder are resolved.

    References elsewhere name keys of a run; they are resolved for each run.
    """
    folder = [text for text in overrides if text.partition("=")[0].strip() == OUTPUT_DIR]
    changed = apply_overrides({key: values[key] for key in values if key == OUTPUT_DIR}, folder)
    for text in overrides:
        if text in folder:
            continue
        key, equals, value = text.partition("=")
        name, _, inner = key.strip().partition(".")
        if not equals or name == "base" or (inner and name not in ("space", "changes", "variants")):
            raise ConfigError(f"{text[:200]!r}: expected a key of the sweep with a value, as in trials=30")
        try:
            parsed = parse_yaml(value)
        except yaml.YAMLError as error:
            raise ConfigError(f"{text!r}: the value is not YAML ({' '.join(str(error).split())})") from error
        if inner:
            inside = changed.get(name, values.get(name)) or {}
            if not isinstance(inside, dict):
                raise ConfigError(f"{file}: {name}: expected keys with values, given {inside!r}")
            parsed = {**inside, inner: parsed}
        changed[name] = parsed
    return changed


def _absolute(changes: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Changes by dotted key, with absolute paths."""
    return {
        key: absolute_path(value, folder, key) if key in PATHS and isinstance(value, str) else value
        for key, value in changes.items()
    }
