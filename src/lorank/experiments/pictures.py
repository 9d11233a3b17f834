"""`ranks.png` of one run, in its folder, and of several."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from lorank.experiments.folder import HISTORY, PICTURE
from lorank.experiments.report_sources import Source
from lorank.experiments.run_numbers import read_run
from lorank.extras import MissingPackageError
from lorank.report import ranks_picture

logger = logging.getLogger("lorank")


def draw_run(folder: Path) -> Path | None:
    """Writes the picture of a run into its folder, if there is a history and the packages are installed.

    A finished run is not lost for want of a picture: every error is a warning.
    """
    history = folder / HISTORY
    if not history.is_file():
        return None
    try:
        return ranks_picture([read_run(Source(folder.name, history, folder))], folder / PICTURE)
    except MissingPackageError:
        return None
    except Exception as error:  # whatever a drawing library raises
        logger.warning("no picture was drawn (%s: %s); the run is complete", type(error).__name__, error)
        return None


def draw_runs(folders: Mapping[str, Path], path: Path, *, title: str, metric: str = "") -> Path:
    """Writes one picture of several runs of one task.

    Args:
        folders: per title of a run, its folder with a rank history.
        path: the file to write.
        title: a line above the picture.
        metric: see :func:`~lorank.experiments.run_numbers.read_run`.

    Raises:
        MissingPackageError: a package of the extra `report` is not installed.
        HistoryError: a history cannot be read.
    """
    runs = [
        replace(read_run(Source(name, folder / HISTORY, folder), metric=metric), method=name, name=name)
        for name, folder in folders.items()
    ]
    return ranks_picture(runs, path, title=title)
