"""From a sweep's file to its trials, and from a trial's parameters to the configurations of its runs."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from lorank.config.errors import ConfigError
from lorank.config.recipes import PATHS
from lorank.config.settings import RunConfig, make_config
from lorank.experiments.sweep.file import SweepFile, read_sweep, split_overrides
from lorank.experiments.sweep.space import VARIANT, Dimension, Scalar, as_yaml, combinations, size

MAX_RUNS = 10_000
MAX_MESSAGE = 10_000
MAX_NAME = 120


@dataclass(frozen=True)
class Setting:
    """What one trial runs.

    Args:
        slot: its number, from 0; a trial that is retried keeps it.
        settings: the settings that differ between trials, without the seed: dotted keys, and `variant`.
        runs: one configuration per seed. Each `output_dir` is inside the sweep's folder.
    """

    slot: int
    settings: Mapping[str, Any]
    runs: Sequence[RunConfig]

    @property
    def label(self) -> str:
        """The settings in one line."""
        return label_of(self.settings)


@dataclass(frozen=True)
class Sweep:
    """A sweep whose file has been read.

    Args:
        file: the content of the file, with the overrides of the sweep itself.
        base: the values of the base configuration.
        overrides: `dotted.key=value` for every run.
        name: the file's name without its ending; the default name of the study.
    """

    file: SweepFile
    base: Mapping[str, Any]
    overrides: Sequence[str]
    name: str

    @property
    def out(self) -> Path:
        """The folder for all runs and the results."""
        return Path(self.file.output_dir)

    @cached_property
    def space(self) -> dict[str, Dimension]:
        """What differs between trials, by Optuna's parameter."""
        return self.file.dimensions

    @property
    def points(self) -> list[dict[str, Scalar]]:
        """The parameters of every trial of a grid, as stored; for another sampler, none: it chooses them."""
        return combinations(self.space) if self.file.sampler == "grid" else []

    @property
    def count(self) -> int:
        """The number of trials."""
        return size(self.space) if self.file.sampler == "grid" else self.file.trials or 0

    def setting(self, slot: int, parameters: Mapping[str, Any]) -> Setting:
        """The trial with these parameters.

        Args:
            slot: the trial's number, from 0.
            parameters: stored values by the names in `space`.

        Raises:
            ConfigError: a value does not fit the configuration.
        """
        return self._setting(slot, {key: self.space[key].value(stored) for key, stored in parameters.items()})

    def label(self, parameters: Mapping[str, Any]) -> str:
        """Stored parameters in one line."""
        return label_of({key: self.space[key].value(stored) for key, stored in parameters.items()})

    def _setting(self, slot: int, settings: Mapping[str, Any]) -> Setting:
        variant = self.file.variants[settings.get(VARIANT, "")]
        chosen = {key: value for key, value in settings.items() if key != VARIANT}
        name = _folder_name(label_of(settings))
        if self.file.sampler != "grid":
            name = f"{slot:03d}_{name}"
        runs = []
        seeds: list[int | None] = [*self.file.seeds] or [None]
        for seed in seeds:
            keys = {**self.file.changes, **variant, **chosen, **({} if seed is None else {"training.seed": seed})}
            own = [f"{key}={as_yaml(value)}" for key, value in keys.items()]
            run = make_config({"output_dir": "-", **self.base}, [*self.overrides, *own], source=name)
            place = self.out / name / f"seed{run.training.seed}"
            runs.append(run.model_copy(update={"output_dir": str(place)}))
        return Setting(slot, settings, runs)

    def grid(self) -> list[Setting]:
        """All trials of a grid; for another sampler, one per value: each value of a list and both ends of each range,
        with the first value of all other keys. They cannot be known before, but wrong values can.

        Raises:
            ConfigError: a value does not fit the configuration. The message lists all of them.
        """
        made, wrong = [], []
        if self.file.sampler == "grid":
            candidates = [{k: self.space[k].value(v) for k, v in point.items()} for point in self.points]
        else:
            first = {key: values.extremes[0] for key, values in self.space.items()}
            candidates = [first] + [
                {**first, key: value} for key, values in self.space.items() for value in values.extremes[1:]
            ]
        for slot, settings in enumerate(candidates):
            try:
                made.append(self._setting(slot, settings))
            except ConfigError as error:
                wrong.append(str(error))
        if wrong:
            message = "\n".join(dict.fromkeys(wrong))
            raise ConfigError(f"{self.name}:\n{message[:MAX_MESSAGE]}{' …' if len(message) > MAX_MESSAGE else ''}")
        return made

    def fingerprint(self) -> dict[str, Any]:
        """What all trials of a study must share, as JSON values. A path counts by its last part: machines that share a
        study may keep the data in different folders."""
        kept = self.file.model_dump(mode="json", exclude={"base", "output_dir", "trials", "pruner", "sampler_seed"})
        kept["sampler"] = "grid" if self.file.sampler == "grid" else "random or tpe"
        runs = [text for text in self.overrides if text.partition("=")[0].strip() != "output_dir"]
        return {**kept, "overrides": runs, "base": _without_folders(self.base)}


def load_sweep(path: str | Path, overrides: Sequence[str] = ()) -> Sweep:
    """Reads a sweep file and checks the configurations of its trials.

    Args:
        path: the YAML file, or the name of a sweep in the package.
        overrides: keys of the sweep (`trials=10`, `output_dir=…`, `space.lora.r=[1, 2]`), and `dotted.key=value` for
            every run's configuration. The sweep's changes, variants and space come after the latter and win.

    Raises:
        ConfigError: the file cannot be read; an unknown key or a wrong value, in the file or in the configuration of
            any trial; a value that occurs twice; too many runs.
    """
    own, for_all = split_overrides(overrides)
    file, base = read_sweep(path, own)
    sweep = Sweep(file, base, tuple(for_all), Path(path).stem)
    runs = sweep.count * max(1, len(file.seeds))
    if runs > MAX_RUNS:
        raise ConfigError(
            f"{path}: trials × seeds give {runs:,} runs; a sweep has at most {MAX_RUNS:,}. Give fewer values"
        )
    folders: set[str] = set()
    for setting in sweep.grid():
        for run in setting.runs if file.sampler == "grid" else ():
            if run.output_dir in folders:
                raise ConfigError(f"{path}: two runs would share the folder {run.output_dir}; a value occurs twice")
            folders.add(run.output_dir)
    return sweep


def label_of(settings: Mapping[str, Any]) -> str:
    """The settings in one line; keys without their sections."""
    parts = [
        str(value) if key == VARIANT else f"{key.rpartition('.')[2]}={_short(value)}" for key, value in settings.items()
    ]
    return ", ".join(parts) or "base"


def _short(value: Any) -> str:
    """A number with at most four digits: a sampled number has sixteen."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _folder_name(label: str) -> str:
    return (re.sub(r"[^\w.=+-]+", "_", label).strip("_.") or "base")[:MAX_NAME]


def _without_folders(base: Mapping[str, Any]) -> dict[str, Any]:
    result = {key: value for key, value in base.items() if key != "output_dir"}
    for key in PATHS:
        section, name = key.split(".")
        part = result.get(section)
        if isinstance(part, Mapping) and isinstance(part.get(name), str):
            result[section] = {**part, name: Path(part[name]).name}
    return result
