"""What was asked of a run, what came out and what it cost, as rows of text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from typing import Any

from lorank.allocators.registry import OWN
from lorank.experiments.adapter_folder import ADAPTER
from lorank.experiments.time_left import duration
from lorank.report.numbers import RunNumbers
from lorank.training.history import Record

Rows = list[tuple[str, str]]

UNITS = {"percent": "% of the base model", "percent_of_adapter": "% of the adapter as it was made"}
"""Units of a budget as text, where the name of the field is not the text."""


def asked_rows(config: Mapping[str, Any], numbers: RunNumbers) -> Rows:
    """What was asked: from the configuration, as far as there is one."""
    allocator, lora = _section(config, "allocator"), _section(config, "lora")
    task, training = _section(config, "task"), _section(config, "training")
    named = ", ".join(f"{key} {_shown(value)}" for key, value in _chosen(allocator).items())
    rows = [
        ("model", _shown(_section(config, "model").get("name"))),
        ("data", _shown(task.get("data"))),
        ("method", numbers.method + (f" ({named})" if named else "")),
        ("budget", _asked_budget(allocator.get("budget")) or ("the method's default" if allocator else "")),
    ]
    if lora:
        rows.append(("adapter", f"rank {_shown(lora.get('r'))}, alpha {_shown(lora.get('alpha'))}"))
        rows.append(("modules", _shown(lora.get("target_modules"))))
    if training:
        rows.append(("learning rate", f"{_shown(training.get('lr'))}, {_shown(training.get('scheduler'))}"))
        rows.append(("batch size", _shown(training.get("batch_size"))))
        rows.append(("seed", _shown(training.get("seed"))))
    return [(name, value) for name, value in rows if value]


def came_out_rows(metrics: Mapping[str, Any], numbers: RunNumbers, records: Sequence[Record]) -> Rows:
    """What came out: from the history and the metrics."""
    first, last = numbers.frames[0], numbers.last
    empty = sum(not rank for rank in last.ranks.values())
    pruned, added = sum(f.pruned for f in numbers.frames), sum(f.added for f in numbers.frames)
    moved = sum(1 for frame in numbers.frames if frame.pruned or frame.added)
    rows = [
        (
            "ranks",
            f"{first.total:,} → {last.total:,} in {len(last.ranks)} modules"
            + (f", {empty} at rank 0" if empty else ""),
        ),
        ("LoRA parameters", f"{first.parameters:,} → {last.parameters:,}" if last.parameters else ""),
        ("budget used", _budget(records)),
        ("moved", f"{pruned:,} ranks pruned, {added:,} added, in {moved} allocations"),
    ]
    steps, best = metrics.get("steps"), metrics.get("best_step")
    if steps is not None:
        rows.append(("steps", _shown(steps) + (f", best at {_shown(best)}" if best is not None else "")))
    validation = _section(metrics, "validation")
    if _number(validation.get("loss_after")) is not None:
        rows.append(
            ("validation loss", f"{_loss(validation.get('loss_before'))} → {_loss(validation.get('loss_after'))}")
        )
    elif numbers.validation:
        rows.append(("validation loss", f"{numbers.validation[-1][1]:.4f}"))
    for name, value in _section(metrics, "test").items():
        if _number(value) is not None:
            rows.append((f"test {name.replace('_', ' ')}", f"{value:.4f}"))
    return [(name, value) for name, value in rows if value]


def cost_rows(metrics: Mapping[str, Any], records: Sequence[Record], folder: Path) -> Rows:
    """What it cost: time, size while training, and size of the files."""
    seconds = _section(metrics, "seconds")
    training, scoring = _number(seconds.get("training")), sum(record.seconds for record in records)
    rows: Rows = []
    if training:
        part = _number(seconds.get("scoring"))
        part = scoring if part is None else part
        rows.append(("training", f"{duration(training)}, of which scoring {duration(part)} ({part / training:.1%})"))
    else:
        rows.append(("scoring and moving ranks", duration(scoring)))
    evaluation = _number(seconds.get("final_evaluation"))
    if evaluation is not None:
        rows.append(("final evaluation", duration(evaluation)))
    if records[-1].shapes:
        widest = max(records, key=lambda record: record.parameters)
        rows.append(("LoRA parameters when largest", f"{widest.parameters:,}, at step {widest.step:,}"))
    trained = _section(metrics, "final").get("trainable_parameters")
    if _number(trained) is not None:
        rows.append(("trained parameters at the end", f"{trained:,}"))
    for name, path in (("files of the adapter", folder / ADAPTER), ("files of the checkpoints", None)):
        paths = [path] if path is not None else list(folder.glob("checkpoint-*"))
        size = sum(file.stat().st_size for place in paths for file in place.rglob("*") if file.is_file())
        if size:
            rows.append((name, _bytes(size)))
    return rows


def _chosen(allocator: Mapping[str, Any]) -> dict[str, Any]:
    """The method's settings that are not its defaults; of a method from another package, all."""
    name = allocator.get("name")
    defaults: dict[str, Any] = {}
    if isinstance(name, str) and name in OWN:
        module, _, kind = OWN[name].partition(":")
        defaults = {field.name: field.default for field in fields(getattr(import_module(module), kind))}
    return {
        key: value
        for key, value in allocator.items()
        if key not in ("name", "budget") and value is not None and value != {} and value != defaults.get(key)
    }


def _asked_budget(value: Any) -> str:
    if isinstance(value, Mapping):
        return "; ".join(f"{_shown(amount)} {_unit(unit)}" for unit, amount in value.items() if amount)
    return _shown(value)


def _budget(records: Sequence[Record]) -> str:
    for record in reversed(records):
        budget = record.details.get("budget")
        if isinstance(budget, Mapping):
            parts = [
                f"{amount['used']:,.6g} of {amount['limit']:,.6g} {_unit(unit)}"
                for unit, amount in budget.items()
                if isinstance(amount, Mapping)
                and None not in (_number(amount.get("used")), _number(amount.get("limit")))
            ]
            return "; ".join(parts)
    return ""


def _unit(unit: Any) -> str:
    return UNITS.get(str(unit), str(unit).replace("_", " "))


def _bytes(size: int) -> str:
    for unit, power in (("GB", 9), ("MB", 6), ("kB", 3)):
        if size >= 10**power:
            return f"{size / 10**power:.3g} {unit}"
    return f"{size} bytes"


def _section(values: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    found = values.get(key)
    return found if isinstance(found, Mapping) else {}


def _shown(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))[:300]
    return f"{value:g}" if isinstance(value, float) else str(value)[:300]


def _loss(value: Any) -> str:
    return "?" if _number(value) is None else f"{value:.4f}"


def _number(value: Any) -> float | None:
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None
