"""Reads the folders of runs, of any loop, and of comparisons into the plain numbers of a report.

A run's folder needs its rank history. Every other file is optional, may be of another version and may come from a
stranger: what cannot be read is left out, and a note says so.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeGuard

from lorank.config.yaml_files import read_yaml
from lorank.errors import LorankError
from lorank.experiments.folder import LOG
from lorank.experiments.folder_check import CONFIG, METRICS
from lorank.experiments.report_sources import CURVE, Source
from lorank.experiments.run_text import asked_rows, came_out_rows, cost_rows
from lorank.files import parse_json, read_bounded
from lorank.report.numbers import Comparison, CurveNumbers, Estimate, Quality, RunNumbers, estimate
from lorank.training import read_history
from lorank.training.history import HistoryError, Record
from lorank.training.plotting import numbers_of

STATE = "trainer_state.json"
MOST_BYTES = 64_000_000
FEW_SEEDS = 3


@dataclass
class Notes:
    """What a reader of one run must know, collected while its files are read."""

    lines: list[str]

    def read(self, path: Path, parse: Callable[[Path], Any]) -> Any:
        """What ``parse`` makes of a file; None, with a note, if it cannot be read, and without one if it is missing."""
        if not path.is_file():
            return None
        try:
            return parse(path)
        except (LorankError, OSError, ValueError, TypeError, KeyError) as error:
            self.lines.append(f"{path.name} cannot be read, so what it says is missing here: {str(error)[:200]}")
            return None


def read_run(source: Source, *, metric: str = "") -> RunNumbers:
    """The numbers of one run.

    Args:
        source: its history and its folder.
        metric: by what runs are compared, "test loss" or "validation loss"; "": the first of the two that there is.

    Raises:
        HistoryError: the history cannot be read, or holds no record.
    """
    records = read_history(source.history)
    if not records:
        raise HistoryError(f"{source.history} holds no record yet: look again after the first step of the run")
    notes, folder = Notes([]), source.folder
    config = _mapping(notes.read(folder / CONFIG, read_yaml))
    metrics = _mapping(notes.read(folder / METRICS, _json))
    log = _log(folder, notes)
    losses, validation = _points(log, "loss"), _points(log, "eval_loss")
    if config and not metrics:
        notes.lines.append("The run is not finished, or was stopped: it has no metrics yet.")
    if isinstance(metrics.get("note"), str):
        notes.lines.append(metrics["note"])
    curve = _curve(folder, notes)
    numbers = numbers_of(records, name=source.name, made=_made(config, records))
    steps = metrics.get("steps")
    return replace(
        numbers,
        losses=losses,
        validation=validation,
        steps=steps if isinstance(steps, int) else None,
        asked=asked_rows(config, numbers),
        came_out=came_out_rows(metrics, numbers, records),
        cost=cost_rows(metrics, records, folder),
        notes=tuple(notes.lines),
        curve=curve,
        quality=_quality(config, metrics, validation, metric),
    )


def read_comparison(path: Path) -> Comparison:
    """The numbers of `lorank compare`, from its comparison.json.

    Raises:
        LorankError: the file cannot be read, or holds no row.
    """
    try:
        values = _mapping(_json(path))
        rows = [row for row in values.get("rows", ()) if isinstance(row, Mapping)]
        groups: dict[str, list[Estimate]] = {}
        for row in rows:
            groups.setdefault(_text(row.get("budget")), []).append(_estimate(row))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise LorankError(f"{path} cannot be read as the result of lorank compare: {error}") from error
    if not groups:
        raise LorankError(f"{path} holds no finished row yet: look again when lorank compare has finished a method")
    fewest = min(len(one.values) for some in groups.values() for one in some)
    return Comparison(
        _text(values.get("task")) or path.parent.name,
        _text(values.get("metric")) or "value",
        groups,
        higher_is_better=values.get("higher_is_better") is True,
        sentence=_text(values.get("sentence")),
        warning=f"Some rows have fewer than {FEW_SEEDS} seeds: another seed can change the order."
        if fewest < FEW_SEEDS
        else "",
    )


def _estimate(row: Mapping[str, Any]) -> Estimate:
    values = [float(value) for value in row.get("values") or () if _is_number(value)]
    label = _text(row.get("title")) or _text(row.get("method"))
    found = estimate(label, values) if values else Estimate(label, math.nan)
    if _is_number(row.get("mean")):
        found = replace(found, mean=float(row["mean"]))
    more = {"learning rate": _text(row.get("lr")), "seeds": str(len(row.get("seeds") or values))}
    difference = row.get("difference")
    if isinstance(difference, Mapping) and all(_is_number(difference.get(key)) for key in ("mean", "low", "high")):
        more["difference"] = f"{difference['mean']:+.4f} ({difference['low']:+.4f} to {difference['high']:+.4f})"
        more["p"] = f"{difference['p']:.2g}" if _is_number(difference.get("p")) else ""
    if _is_number(row.get("equivalent_k")):
        more["as LoRA with k times the parameters"] = f"{row['equivalent_k']:.2g}"
    size = row.get("parameters")
    if row.get("sized") is False:  # all weights: on their axis, adapters would look alike
        more["trained parameters"] = _text(size)
        size = None
    return replace(
        found,
        parameters=float(size) if _is_number(size) and math.isfinite(size) else None,
        note=_text(row.get("sentence")),
        more=more,
    )


def _log(folder: Path, notes: Notes) -> list[Mapping[str, Any]]:
    """The Trainer's logs: of the run's own file, else of the last checkpoint."""
    if (folder / LOG).is_file():
        return notes.read(folder / LOG, lambda path: list(_lines(path))) or []
    checkpoints = [
        (int(found[1]), path)
        for path in folder.glob("checkpoint-*")
        if (found := re.fullmatch(r"checkpoint-(\d+)", path.name))
    ]
    for place in [folder, *(path for _, path in sorted(checkpoints, reverse=True))]:
        state = notes.read(place / STATE, _json)
        if isinstance(state, Mapping) and isinstance(state.get("log_history"), list):
            return [entry for entry in state["log_history"] if isinstance(entry, Mapping)]
    return []


def _lines(path: Path) -> Iterator[Mapping[str, Any]]:
    for line in read_bounded(path, MOST_BYTES).splitlines():
        entry = parse_json(line)
        if isinstance(entry, Mapping):
            yield entry


def _points(log: Sequence[Mapping[str, Any]], key: str) -> list[tuple[int, float]]:
    points = {
        entry["step"]: float(entry[key])
        for entry in log
        if isinstance(entry.get("step"), int) and _is_number(entry.get(key)) and math.isfinite(entry[key])
    }
    return sorted(points.items())


def _made(config: Mapping[str, Any], records: Sequence[Record]) -> dict[str, int] | None:
    """The ranks with which `lorank train` made the adapter; None: not known."""
    rank = _mapping(config.get("lora")).get("r")
    return dict.fromkeys(records[0].ranks, rank) if isinstance(rank, int) and 0 < rank < 1 << 24 else None


def _curve(folder: Path, notes: Notes) -> CurveNumbers | None:
    for path in (folder / CURVE, folder / "curve" / CURVE, folder.with_name(f"{folder.name}_curve") / CURVE):
        found = notes.read(path, _read_curve)
        if found is not None:
            return found  # type: ignore[no-any-return]
    return None


def _read_curve(path: Path) -> CurveNumbers:
    values = _json(path)
    points = [(int(point["parameters"]), float(point["loss"])) for point in values["points"]]
    knee = _mapping(values.get("knee"))
    title = f"{_text(values.get('data'))}, {_text(values.get('samples'))} examples"
    if not points or not all(size > 0 and math.isfinite(loss) for size, loss in points):
        raise ValueError("it has no points")
    return CurveNumbers(points, (int(knee["parameters"]), float(knee["loss"])) if knee else None, title)


def _quality(
    config: Mapping[str, Any], metrics: Mapping[str, Any], validation: Sequence[tuple[int, float]], wanted: str
) -> Quality | None:
    task = f"{_text(metrics.get('data'))} with {_text(metrics.get('model'))}" if metrics else ""
    training = _mapping(config.get("training"))
    seed = training.get("seed")
    same = {**config, "training": {**training, "seed": None}, "output_dir": None}
    setting = repr(same) if config else f"unknown {id(validation)}"
    for metric, value in (
        ("test loss", _mapping(metrics.get("test")).get("loss")),
        ("validation loss", _mapping(metrics.get("validation")).get("loss_after")),
        ("validation loss", validation[-1][1] if validation else None),
    ):
        if _is_number(value) and wanted in ("", metric):
            return Quality(metric, float(value), task, setting, seed if isinstance(seed, int) else None)
    return None


def _json(path: Path) -> Any:
    return parse_json(read_bounded(path, MOST_BYTES))


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _text(value: Any) -> str:
    return "" if value is None else str(value)[:300]


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)
