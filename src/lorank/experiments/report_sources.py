"""Which runs and comparisons a report is about. Checked before anything slow is imported."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lorank.experiments.errors import SettingsError

HISTORY, COMPARISON, CURVE = "rank_history.jsonl", "comparison.json", "curve.json"
MOST_RUNS = 40
"""Runs in one report. More make a page that nobody reads, and that is too large to send."""


@dataclass(frozen=True)
class Source:
    """One run.

    Args:
        name: its name in the report.
        history: the file with its rank history.
        folder: the folder with its other files.
    """

    name: str
    history: Path
    folder: Path


def find_sources(given: Sequence[Path]) -> tuple[list[Source], list[Path]]:
    """The runs, and the files of comparisons, that folders hold.

    Args:
        given: folders of runs or of comparisons; folders of such folders, at most two levels up; or histories.

    Raises:
        SettingsError: one of them holds neither, or there are too many runs.
    """
    histories: list[Path] = []
    comparisons: list[Path] = []
    for path in given:
        found, compared = _found(path)
        histories += [one for one in found if one not in histories]
        comparisons += [one for one in compared if one not in comparisons]
    if len(histories) > MOST_RUNS:
        raise SettingsError(
            f"{len(histories)} runs for one report: give at most {MOST_RUNS}. `lorank compare` and `lorank sweep` put "
            "more of them into one table"
        )
    names = _names(histories)
    return [Source(name, path, path.parent) for name, path in zip(names, histories, strict=True)], comparisons


def _found(path: Path) -> tuple[list[Path], list[Path]]:
    if path.is_file() and path.suffix == ".jsonl":
        return [path], []
    if path.is_file() and path.name == COMPARISON:
        return [], [path]
    if not path.is_dir():
        raise SettingsError(f"{path}: there is no such folder. Give the folder of a run, or a {HISTORY}")
    if (path / COMPARISON).is_file():
        return [], [path / COMPARISON]
    for pattern in (HISTORY, f"*/{HISTORY}", f"*/*/{HISTORY}"):
        histories = sorted(path.glob(pattern))
        if histories:
            return histories, []
    # an adapter inside the folder of its run
    if (path.parent / HISTORY).is_file():
        return [path.parent / HISTORY], []
    raise SettingsError(
        f"{path} holds no {HISTORY} and no {COMPARISON}, nor do the folders in it. Give the folder of a run of "
        "`lorank train`, the folder in which the Trainer or your loop wrote its history, or that of `lorank compare`"
    )


def _names(histories: Sequence[Path]) -> list[str]:
    """The shortest ends of the folders' paths that tell them apart."""
    parents = [path.resolve().parent for path in histories]
    for depth in range(1, max((len(path.parts) for path in parents), default=0) + 1):
        names = ["/".join(path.parts[-depth:]).lstrip("/") or "/" for path in parents]
        if len(set(names)) == len(names):
            return names
    # several histories in one folder
    return [str(path) for path in histories]
