"""`lorank curve`: the rank curve of a finished adapter, or of a short wide run of a recipe, with its files."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from lorank.allocators import RankCurve, rank_curve
from lorank.config.settings import FullSettings, RunConfig, load_config
from lorank.experiments.adapter_session import LoadedAdapter, load_finished
from lorank.experiments.errors import SettingsError
from lorank.experiments.run import train
from lorank.experiments.scores import gramian_batches
from lorank.files import write_text
from lorank.report import Line, curve_picture

JSON, PICTURE, RUN = "curve.json", "curve.png", "run"
FILE_BEGINS = '{\n  "curve of": '


@dataclass(frozen=True)
class Measured:
    """A rank curve and what it was measured on.

    Args:
        adapter: the adapter's folder.
        curve: the curve.
        data: the data's name.
        samples: number of validation examples.
        steps: optimiser steps of the wide run that was made for the curve; None: the adapter was there.
    """

    adapter: Path
    curve: RankCurve
    data: str
    samples: int
    steps: int | None = None


def measure(loaded: LoadedAdapter, *, samples: int = 64, progress: Any = None) -> Measured:
    """The rank curve of an adapter, on the first `samples` validation examples.

    Args:
        loaded: the adapter; it is not changed.
        samples: number of examples, ≥ 1.
        progress: called with (batches done, batches in all); or None.

    Raises:
        ValidationBatchError: see :func:`lorank.rank_curve`.
    """
    curve = rank_curve(loaded.model, gramian_batches(loaded, samples), progress=progress)
    return Measured(loaded.adapter, curve, loaded.config.task.data, len(loaded.task.validation[:samples]))


def wide_run(
    recipe: str | Path,
    overrides: Sequence[str],
    folder: Path,
    *,
    rank: int,
    fraction: float,
    overwrite: bool = False,
    console: Console | None = None,
) -> tuple[LoadedAdapter, int]:
    """Trains a static LoRA of a recipe, wide and for a part of its steps, with the schedule of a run of that length.

    The factor s of every update is that of the recipe, so the learning rate means what it means there.

    Args:
        recipe: the name of a recipe, or a file.
        overrides: `dotted.key=value`, as for `lorank train`.
        folder: the folder of the run.
        rank: the rank of every module, ≥ 2.
        fraction: the part of the recipe's steps, in (0, 1].
        overwrite: first remove the run in that folder.
        console: shows the progress; None: standard error.

    Returns:
        The finished adapter, and the steps of the run.

    Raises:
        SettingsError: the rank, the fraction or the recipe does not suit.
        LorankError: see :func:`lorank.experiments.train`.
    """
    config = wide_config(load_config(recipe, overrides), recipe, overrides, folder, rank=rank, fraction=fraction)
    result = train(config, overwrite=overwrite and folder.exists(), console=console)
    return load_finished(folder), int(result.metrics["steps"])


def wide_config(
    config: RunConfig, recipe: str | Path, overrides: Sequence[str], folder: Path, *, rank: int, fraction: float
) -> RunConfig:
    """The configuration of :func:`wide_run`."""
    if rank < 2:
        raise SettingsError(f"--rank {rank}: expected at least 2; the curve knows only ranks that are there")
    if not 0 < fraction <= 1:
        raise SettingsError(f"--fraction {fraction:g}: expected above 0 and at most 1")
    if isinstance(config.allocator, FullSettings):
        raise SettingsError(f"{recipe} trains all weights, which have no ranks: give a recipe with a LoRA")
    lora, training = config.lora, config.training
    scale = math.sqrt(rank / lora.r) if lora.use_rslora else rank / lora.r
    changes = {
        "allocator": {"name": "static"},
        "allocator_samples": None,
        "lora.r": rank,
        "lora.alpha": lora.alpha * scale,
        "lora.initial_ranks": "uniform",
        "training.epochs": training.epochs * fraction,
        "training.max_steps": None if training.max_steps is None else max(1, round(training.max_steps * fraction)),
        "output_dir": str(folder),
    }
    return load_config(recipe, [*overrides, *(f"{key}={json.dumps(value)}" for key, value in changes.items())])


def check_files(folder: Path, *, overwrite: bool) -> None:
    """Checks that the files of a curve may be written to a folder.

    Raises:
        SettingsError: it is a file, or has such a file that is not of a curve, or of another one without `overwrite`.
    """
    if folder.exists() and not folder.is_dir():
        raise SettingsError(f"--out {folder} is a file: name a folder")
    there = folder / JSON
    if not there.exists() and not (folder / PICTURE).exists():
        return
    ours = there.is_file() and there.read_text(encoding="utf-8", errors="replace").startswith(FILE_BEGINS)
    if not ours:
        name = JSON if there.exists() else PICTURE
        raise SettingsError(f"--out {folder} has a {name} that is not of a rank curve: name another folder")
    if not overwrite:
        raise SettingsError(f"--out {folder} has a rank curve: name another folder, or replace it (--overwrite)")


def as_json(measured: Measured) -> dict[str, Any]:
    """A curve as `curve.json` holds it."""
    return {
        "curve of": str(measured.adapter),
        "data": measured.data,
        "samples": measured.samples,
        "steps": measured.steps,
        **measured.curve.to_dict(),
        "lora_config_at_knee": measured.curve.lora_config("knee"),
    }


def write(measured: Measured, folder: Path) -> None:
    """Writes `curve.json` and `curve.png`.

    Raises:
        MissingPackageError: matplotlib is not installed.
        WriteError: no space, no permission.
    """
    curve = measured.curve
    points = [(point.parameters, point.loss) for point in curve.points]
    curve_picture(
        [Line("predicted: the present loss + ½ Σ σ² of the ranks left out", points)],
        folder / PICTURE,
        knee=(curve.knee.parameters, curve.knee.loss),
        title=f"Rank curve: {measured.data}, {measured.samples} examples",
    )
    write_text(folder / JSON, json.dumps(as_json(measured), indent=2) + "\n")
