"""A run's folder: its files, whether a run may start or resume in it, and the checkpoint to resume from.

config.yaml          the configuration with every default
checkpoint-<step>/   everything that the Trainer needs to resume, including a plain PEFT adapter
rank_history.jsonl   one line per allocation
log_history.jsonl    the Trainer's logs, one line each
adapter/             the result: a plain PEFT adapter
ranks.png            where the ranks went, if the packages of the extra `report` are installed
metrics.json         the metrics; written last, so this file exists only if the run is complete
"""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lorank.config.settings import RunConfig, load_config, to_yaml
from lorank.experiments.adapter_folder import ADAPTER
from lorank.experiments.errors import RunFolderError
from lorank.experiments.folder_check import CONFIG, METRICS, check_folder, is_free, require_run
from lorank.files import remove_leftovers, write_text
from lorank.training.checkpoint.integrity import checkpoints, files_of_others, last_checkpoint, remove_broken

logger = logging.getLogger("lorank")

__all__ = [
    "ADAPTER",
    "CONFIG",
    "FULL_MODEL",
    "HISTORY",
    "LOG",
    "METRICS",
    "PICTURE",
    "abandon",
    "differences",
    "prepare",
    "remove_run",
]

HISTORY = "rank_history.jsonl"
LOG = "log_history.jsonl"
PICTURE = "ranks.png"
FULL_MODEL = "model"
_HISTORIES = re.compile(r"rank_history(\.\d+)?\.jsonl")


def prepare(config: RunConfig, *, resume: bool, overwrite: bool) -> Path | None:
    """Prepares the folder for a run and writes the configuration into it.

    Args:
        config: the run; its `output_dir` is the folder.
        resume: continue the run in the folder.
        overwrite: remove the run in the folder. Other files are not touched; if they are inside its checkpoints or its
            results, the run is not removed.

    Returns:
        The checkpoint to resume from; None to start at the first step (also if the resumed run had saved no
        checkpoint).

    Raises:
        RunFolderError: the folder is not empty and neither option was given; there is no run to resume; the run in the
            folder is complete or has another configuration.
    """
    folder = Path(config.output_dir)
    check_folder(folder, resume=resume, overwrite=overwrite)
    if resume:
        _check_same_configuration(config, folder)
        remove_leftovers(folder)
        remove_broken(folder)
        last = last_checkpoint(folder)
        if last is None:
            logger.warning("no complete checkpoint in %s: the run starts at its first step", folder)
        return Path(last) if last else None
    if not is_free(folder):
        remove_run(folder)
    folder.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder)
    write_text(folder / CONFIG, to_yaml(config))
    return None


def abandon(folder: Path) -> None:
    """Undoes `prepare` for a run that has taken no step, and so has no checkpoint."""
    _remove_records(folder)
    if not any(folder.iterdir()):
        folder.rmdir()


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """One line `key: old → new` for every difference between two nested mappings."""
    found = []
    for key in [*old, *(key for key in new if key not in old)]:
        before, after = old.get(key), new.get(key)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            found += differences(before, after, f"{prefix}{key}.")
        elif before != after:
            found.append(f"{prefix}{key}: {before!r} → {after!r}")
    return found


def check_results(folder: Path, names: Sequence[str], *, runs: str) -> None:
    """Checks that results may be written into a folder: files of these names, if any, are results of earlier runs.

    Args:
        folder: the folder of a sweep, a study or the demo. It need not exist.
        names: the names of the files with results.
        runs: a pattern that finds the files of its own runs in the folder.

    Raises:
        RunFolderError: the folder holds such a file and no run that it could be a result of.
    """
    found = [name for name in names if os.path.lexists(folder / name)]
    if found and next(folder.glob(runs), None) is None:
        raise RunFolderError(
            f"{folder / found[0]} would be replaced, and {folder} holds no run that it could be a result of ({runs}). "
            "Name another folder, or move the file elsewhere."
        )


def remove_run(folder: Path) -> None:
    """Removes the files of a run. Other files are not touched.

    Raises:
        RunFolderError: the folder holds no run, or other files are inside the run's own subfolders. The Trainer removes
            whole checkpoints, so they would not be safe there. Nothing was removed.
    """
    require_run(folder)
    subfolders = [*checkpoints(folder), *(path for name in (ADAPTER, FULL_MODEL) if (path := folder / name).is_dir())]
    others = [path for subfolder in subfolders for path in files_of_others(subfolder)]
    if others:
        raise RunFolderError(
            f"--overwrite: {others[0]} is inside the run's own folders and was not written by the run ({len(others)} "
            "such files in all); nothing was removed. Move them elsewhere, or name another output_dir."
        )
    for path in subfolders:
        shutil.rmtree(path)
    _remove_records(folder)


def _remove_records(folder: Path) -> None:
    # remove the configuration last: if this is interrupted, the folder can still be recognised as a run's folder
    histories = [path for path in folder.iterdir() if _HISTORIES.fullmatch(path.name)]
    for path in [*histories, folder / PICTURE, folder / LOG, folder / METRICS, folder / CONFIG]:
        path.unlink(missing_ok=True)


def _check_same_configuration(config: RunConfig, folder: Path) -> None:
    there = load_config(folder / CONFIG).model_dump(mode="json", exclude={"output_dir"})
    changed = differences(there, config.model_dump(mode="json", exclude={"output_dir"}))
    if changed:
        lines = "\n".join(f"  {line}" for line in changed)
        raise RunFolderError(
            f"--resume: the run in {folder} has another configuration, so its schedules would not fit:\n{lines}\n"
            f"Resume with {folder / CONFIG}, or name another output_dir."
        )
