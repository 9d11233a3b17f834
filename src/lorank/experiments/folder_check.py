"""Whether a run may start or resume in a folder. Checked before anything slow is imported."""

from __future__ import annotations

from pathlib import Path

from lorank.experiments.errors import RunFolderError
from lorank.files import is_leftover

CONFIG, METRICS = "config.yaml", "metrics.json"


def check_folder(folder: Path, *, resume: bool, overwrite: bool) -> None:
    """Checks the folder of a run. Changes nothing.

    Raises:
        RunFolderError: the folder is a file; or is not empty and neither option was given; there is no run to resume or
            to remove; or the run to resume is complete.
    """
    if folder.exists() and not folder.is_dir():
        raise RunFolderError(f"output_dir {folder} is a file: name a folder.")
    if resume and overwrite:
        raise RunFolderError("--resume continues a run and --overwrite removes it: give only one of them.")
    if resume:
        _require_unfinished_run(folder)
    elif not is_free(folder):
        if not overwrite:
            raise RunFolderError(
                f"output_dir {folder} is not empty. Continue the run in it (--resume), remove that run (--overwrite), "
                "or name another folder (output_dir=…)."
            )
        require_run(folder)


def is_free(folder: Path) -> bool:
    """Whether the folder does not exist, or is empty but for leftovers of an interrupted write."""
    return not folder.is_dir() or all(map(is_leftover, folder.iterdir()))


def require_run(folder: Path) -> None:
    """Raises RunFolderError if the folder holds no run that --overwrite may remove."""
    if not (folder / CONFIG).is_file():
        raise RunFolderError(
            f"--overwrite: {folder} is not empty and holds no run (no {CONFIG}); nothing was removed. "
            "Name another folder."
        )


def _require_unfinished_run(folder: Path) -> None:
    if not (folder / CONFIG).is_file():
        raise RunFolderError(f"--resume: there is no run in {folder} (no {CONFIG}). Start it without --resume.")
    if (folder / METRICS).is_file():
        raise RunFolderError(
            f"--resume: the run in {folder} is complete, its metrics are in {METRICS}. "
            "Name another output_dir, or give --overwrite to run it again."
        )
