"""`lorank sweep`: one recipe with many settings. Every run can be resumed; a table and a picture compare the results.

    base: e2e_ard                       # a recipe, a YAML file beside this one, or a whole configuration
    variants:                           # named settings; several keys may change together
      both: {}
      tv only: {allocator.l1_term: false}
    grid:                               # every combination of these
      allocator.l1: [0.001, 0.01, 0.1]
    seeds: [0, 1]
    output_dir: runs/my_sweep

Runs = variants × grid × seeds. All configurations are checked before the first run starts.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.markup import escape

from lorank.config.settings import ConfigError, RunConfig, load_config, make_config
from lorank.experiments import folder
from lorank.experiments.errors import RunFolderError
from lorank.experiments.run import RunResult, train
from lorank.experiments.sweep_file import read_sweep

MAX_RUNS = 10_000
MAX_MESSAGE = 10_000


@dataclass(frozen=True)
class SweepRun:
    """One run of a sweep.

    Args:
        settings: the settings that differ between runs, without the seed: dotted keys, and `variant` for a named
            variant.
        config: the whole configuration; its `output_dir` is inside the sweep's folder.
    """

    settings: Mapping[str, Any]
    config: RunConfig

    @property
    def label(self) -> str:
        """The settings in one line."""
        return _label(self.settings)


@dataclass(frozen=True)
class Finished:
    """A complete run and its metrics (see `docs/recipes.md`)."""

    run: SweepRun
    metrics: Mapping[str, Any]


@dataclass(frozen=True)
class SweepResult:
    """The result of a sweep.

    Args:
        finished: all complete runs in order, including runs of earlier calls.
        failures: (label, seed, message) of each failed run.
        new: number of finished runs that this call has run.
    """

    finished: Sequence[Finished]
    failures: Sequence[tuple[str, int, str]]
    new: int


def load_sweep(path: str | Path, overrides: Sequence[str] = ()) -> tuple[Path, list[SweepRun]]:
    """Reads a sweep file and checks the configurations of all runs.

    Args:
        path: the YAML file, or the name of a sweep in the package.
        overrides: `dotted.key=value` for every run's configuration; the sweep's own settings come after them and win.
            `output_dir` is the sweep's folder.

    Returns:
        The sweep's folder and its runs.

    Raises:
        ConfigError: the file cannot be read; an unknown key or a wrong value, in the file or in the configuration of
            any run; a value or a seed that occurs twice.
    """
    own = [text for text in overrides if text.partition("=")[0].strip() == "output_dir"]
    sweep, base = read_sweep(path, own)
    base = {"output_dir": "-", **base}  # every run gets its own folder below
    for_all = [text for text in overrides if text not in own]
    out = Path(sweep.output_dir)
    count = math.prod([len(sweep.variants), *map(len, sweep.grid.values()), max(1, len(sweep.seeds))])
    if count > MAX_RUNS:
        raise ConfigError(
            f"{path}: variants × grid × seeds give {count:,} runs; a sweep has at most {MAX_RUNS:,}. Give fewer values"
        )
    runs, wrong, folders = [], [], set()
    for (variant, changes), combination in itertools.product(
        sweep.variants.items(), itertools.product(*sweep.grid.values())
    ):
        chosen = dict(zip(sweep.grid, combination, strict=True))
        settings = {**({"variant": variant} if variant else {}), **chosen}
        seeds: list[int | None] = [*sweep.seeds] or [None]
        for seed in seeds:
            keys = {**changes, **chosen, **({} if seed is None else {"training.seed": seed})}
            own_changes = [f"{key}={_as_yaml(value)}" for key, value in keys.items()]
            name = _folder_name(_label(settings))
            try:
                run = make_config(base, [*for_all, *own_changes], source=name)
            except ConfigError as error:
                wrong.append(str(error))
                continue
            place = out / name / f"seed{run.training.seed}"
            if place in folders:
                raise ConfigError(f"{path}: two runs would share the folder {place}; a value or a seed occurs twice")
            folders.add(place)
            runs.append(SweepRun(settings, run.model_copy(update={"output_dir": str(place)})))
    if wrong:
        message = "\n".join(dict.fromkeys(wrong))
        raise ConfigError(f"{path}:\n{message[:MAX_MESSAGE]}{' …' if len(message) > MAX_MESSAGE else ''}")
    return out, runs


def run_sweep(
    runs: Sequence[SweepRun],
    *,
    console: Console | None = None,
    train_run: Callable[..., RunResult] = train,
) -> SweepResult:
    """Runs all unfinished runs of a sweep. An interrupted run continues from its last checkpoint.

    A run that fails does not end the sweep. It is reported, and the next call tries it again.

    Args:
        runs: the runs from :func:`load_sweep`.
        console: shows the progress; None: standard error.
        train_run: the function that runs a configuration.

    Raises:
        RunFolderError: a run's folder holds a run with another configuration. No run was started.
    """
    console = console or Console(stderr=True)
    metrics = [_finished(run) for run in runs]  # check all folders before the first run starts
    finished, failures, new = [], [], 0
    for number, (run, known) in enumerate(zip(runs, metrics, strict=True), 1):
        seed, there = run.config.training.seed, known
        if there is None:
            console.print(f"[bold]{number} of {len(runs)}:[/] {escape(run.label)}, seed {seed}", highlight=False)
            began = (Path(run.config.output_dir) / folder.CONFIG).is_file()
            try:
                there = train_run(run.config, resume=began, console=console).metrics
                new += 1
            except Exception as error:  # any error: the other runs must still be run
                message = f"{type(error).__name__}: {error}"
                console.print(f"[red]failed[/] {escape(message)}", highlight=False)
                failures.append((run.label, seed, message))
                continue
        finished.append(Finished(run, there))
    return SweepResult(finished, failures, new)


def _finished(run: SweepRun) -> Mapping[str, Any] | None:
    """The metrics of a complete run; None for a run that is not complete.

    Raises:
        RunFolderError: the folder holds another run.
    """
    place = Path(run.config.output_dir)
    if not (place / folder.CONFIG).is_file():
        return None
    there = load_config(place / folder.CONFIG).model_dump(mode="json", exclude={"output_dir"})
    changed = folder.differences(there, run.config.model_dump(mode="json", exclude={"output_dir"}))
    if changed:
        raise RunFolderError(
            f"{place} holds a run with another configuration ({'; '.join(changed)}). Name another output_dir for the "
            "sweep, or remove that folder."
        )
    metrics = place / folder.METRICS
    loaded: dict[str, Any] | None = json.loads(metrics.read_text(encoding="utf-8")) if metrics.is_file() else None
    return loaded


def _as_yaml(value: Any) -> str:
    """A value as text for an override. Unlike str(), it keeps 1e-05 a number."""
    return yaml.safe_dump(value, default_flow_style=True, width=10**9).removesuffix("...\n").strip()


def _label(settings: Mapping[str, Any]) -> str:
    """The settings in one line; keys without their sections."""
    parts = [str(v) if k == "variant" else f"{k.rpartition('.')[2]}={v}" for k, v in settings.items()]
    return ", ".join(parts) or "base"


def _folder_name(label: str) -> str:
    return re.sub(r"[^\w.=+-]+", "_", label).strip("_.") or "base"
