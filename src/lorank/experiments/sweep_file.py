"""The YAML file of a sweep. It is checked before anything slow is imported."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from lorank.config.errors import ConfigError, explain
from lorank.config.recipes import PATHS, absolute_path, find_file, with_absolute_paths
from lorank.config.yaml_files import apply_overrides, read_yaml
from lorank.tasks.settings import Settings


class SweepFile(Settings):
    """The content of a sweep's YAML file."""

    base: str | dict[str, Any]
    """A recipe: its name, or the path of a YAML file, relative to the sweep's file; or a whole configuration."""
    variants: dict[str, dict[str, Any]] = Field(default={"": {}}, min_length=1)
    """Named settings: dotted keys of the configuration with their values."""
    grid: dict[str, list[Any]] = Field(default_factory=dict)
    """Dotted keys of the configuration, each with a list of values; every combination is run."""
    seeds: list[int] = Field(default_factory=list)
    """Seeds (`training.seed`) of every setting; empty: the seed of the base."""
    output_dir: str = Field(min_length=1)
    """The folder for all runs and the results."""


def read_sweep(path: str | Path, overrides: Sequence[str] = ()) -> tuple[SweepFile, dict[str, Any]]:
    """Reads the file of a sweep and its base. Relative paths in a file start from the folder of that file.

    Args:
        path: the YAML file, or the name of a sweep in the package.
        overrides: `output_dir=…`, or nothing.

    Returns:
        The sweep, and the values of its base configuration.

    Raises:
        ConfigError: a file does not exist or is not YAML, or the sweep has unknown keys or wrong values.
    """
    file = find_file(path)
    values = read_yaml(file)
    # references outside output_dir name keys of a run; they are resolved for each run
    values |= apply_overrides({key: values[key] for key in values if key == "output_dir"}, overrides)
    try:
        sweep = SweepFile.model_validate(values)
    except ValidationError as error:
        raise ConfigError(explain(error, SweepFile, str(path))) from error
    _check_keys(sweep, file)
    sweep = sweep.model_copy(
        update={
            "variants": {name: _absolute(changes, file.parent) for name, changes in sweep.variants.items()},
            "grid": {
                key: [_absolute({key: v}, file.parent)[key] for v in values] for key, values in sweep.grid.items()
            },
        }
    )
    if isinstance(sweep.base, dict):
        return sweep, with_absolute_paths(sweep.base, file.parent)
    try:
        base = find_file(sweep.base, beside=file.parent)
    except ConfigError as error:
        raise ConfigError(f"{file}: base: {error}") from error
    return sweep, with_absolute_paths(read_yaml(base), base.parent)


def _absolute(changes: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Changes by dotted key, with absolute paths."""
    return {
        key: absolute_path(value, folder, key) if key in PATHS and isinstance(value, str) else value
        for key, value in changes.items()
    }


def _check_keys(sweep: SweepFile, path: Path) -> None:
    empty = [key for key, values in sweep.grid.items() if not values]
    if empty:
        raise ConfigError(f"{path}: grid.{empty[0]} has no values: give at least one")
    for name, changes in sweep.variants.items():
        both = sorted(set(changes) & set(sweep.grid))
        if both:
            raise ConfigError(f"{path}: {both[0]} is in the grid and in the variant {name!r}: give it in only one")
    changed = {*sweep.grid, *itertools.chain(*sweep.variants.values())}
    reserved = [key for key in ("output_dir", "training.seed") if key in changed]
    if reserved:
        instead = {"output_dir": "output_dir", "training.seed": "seeds"}[reserved[0]]
        raise ConfigError(
            f"{path}: {reserved[0]} cannot be set in variants or in the grid: use the sweep's own key {instead}"
        )
