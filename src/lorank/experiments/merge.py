"""Several adapters of one base model become one: the weighted sum of their updates, cut to a size.

The sum is exact, and has all ranks of all adapters. The cut is by singular values, or, where there are data, by
balanced truncation with Gramians of examples of all tasks, so that what each task uses counts.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorank.allocators import Budget, resize_layers_, truncate_
from lorank.allocators.truncation import STAGES
from lorank.errors import AdapterError, BudgetError
from lorank.experiments.adapter_folder import (
    ADAPTER,
    adapter_of_run,
    budget_of_adapter,
    check_pruned_folder,
    check_weights,
)
from lorank.experiments.adapter_session import LoadedAdapter, load_finished
from lorank.experiments.errors import SettingsError
from lorank.experiments.folder_check import CONFIG
from lorank.experiments.resize import compare_updates
from lorank.experiments.scores import gramian_batches
from lorank.lora import check_save_directory, open_standalone, save_adapter, save_standalone
from lorank.lora.export import read_adapter_file, weighted_sum, write_form


@dataclass(frozen=True)
class TaskLoss:
    """Mean losses on one task's validation examples that were not used for the cut.

    Attributes:
        task: the task's data.
        whole: the loss of the sum with all its ranks.
        merged: the loss of the written adapter.
        examples: the number of examples.
    """

    task: str
    whole: float
    merged: float
    examples: int


@dataclass(frozen=True)
class Merged:
    """A merged adapter. All figures are of its files, read again.

    Attributes:
        folder: its folder.
        weights: the weight of each adapter.
        by: balanced or svd; None: nothing was cut.
        ranks: per module, (in the sum, in the merged adapter).
        parameters: numbers in A and B, (of the sum, of the merged adapter).
        energy: the share of the sum's Σ ‖ΔW‖² that it holds.
        losses: per task, by ``balanced``.
    """

    folder: Path
    weights: tuple[float, ...]
    by: str | None
    ranks: Mapping[str, tuple[int, int]]
    parameters: tuple[int, int]
    energy: float
    losses: tuple[TaskLoss, ...]


def merge(
    adapters: Sequence[str | Path],
    out: str | Path,
    *,
    weights: Sequence[float] | None = None,
    rank: int | None = None,
    budget: str | None = None,
    by: str | None = None,
    configs: Sequence[str | Path] = (),
    samples: int = 32,
    overwrite: bool = False,
    progress: Any = None,
) -> Merged:
    """Writes one adapter for several.

    Args:
        adapters: two or more folders of plain PEFT LoRA adapters, or of finished `lorank train`. They stay as they are.
        out: the folder for the merged adapter.
        weights: one for each adapter; None: 1 / n each, the mean.
        rank: the highest rank of any module of the result.
        budget: its size, as text: `50%` (of the sum), 8 (ranks per module on average), 120 ranks, 2M or 8MB.
        by: `balanced` (needs data) or `svd`; None: `balanced` if there are data. Nothing is cut without a size.
        configs: configurations with the data to measure on, one for each task; none: those of the adapters' own runs.
        samples: examples of each task to measure on.
        overwrite: replace an adapter in `out`. Other files are never touched.
        progress: called with (batches done, batches in all); or None.

    Raises:
        AdapterError: an adapter cannot be read, or they do not fit one base model; or `out` is not empty.
        BudgetError: the sum already fits the budget, or the budget cannot be read.
        SettingsError: the numbers of adapters and weights differ, or `balanced` has no data.
    """
    folders = [adapter_of_run(Path(adapter)) for adapter in adapters]
    for folder in folders:
        check_pruned_folder(folder, Path(out), overwrite=overwrite)
    check_save_directory(Path(out))
    chosen = check_weights(folders, weights)
    tasks = [Path(config) for config in configs] or _own_configs(folders)
    kind = _kind_of_cut(by, tasks, cut=rank is not None or budget is not None)
    files = [read_adapter_file(folder) for folder in folders]
    check_one_base([(file.folder, file.config.base_model_name_or_path) for file in files])
    size = _size(rank, budget)
    losses: tuple[TaskLoss, ...] = ()
    with tempfile.TemporaryDirectory() as temporary:
        whole = Path(temporary) / ADAPTER
        write_form(weighted_sum(files, chosen), whole)
        before = open_standalone(whole)
        if kind == "balanced":
            assert size is not None  # there is a cut
            losses = _cut_balanced(whole, Path(out), size, tasks, samples, progress)
        else:
            changed = open_standalone(whole)
            if size is not None:
                resize_layers_(changed.layers, budget=size)
            save_standalone(changed, out)
    written = open_standalone(out)
    energies, missing = compare_updates(before.layers, written.layers)
    total = sum(energies.values())
    return Merged(
        folder=Path(out),
        weights=tuple(chosen),
        by=kind,
        ranks={name: (one.rank, written.layers.ranks.get(name, 0)) for name, one in before.layers.items()},
        parameters=(before.layers.parameters, written.layers.parameters),
        energy=1 - sum(missing.values()) / total if total else 1.0,
        losses=losses,
    )


def check_one_base(named: Sequence[tuple[Path, str | None]]) -> None:
    """Raises AdapterError if adapters name different base models. A hub name and a folder of the same name are one."""
    names = {Path(base).name for _, base in named if base}
    if len(names) > 1:
        raise AdapterError(
            f"the adapters are of different base models ({', '.join(sorted(names))}), and the sum of their updates has "
            "no meaning. If they are the same model, write one name for base_model_name_or_path into their "
            "adapter_config.json"
        )


def _size(rank: int | None, budget: str | None) -> Budget | None:
    if budget is None:
        return None if rank is None else Budget(max_lora_rank=rank)
    if rank is not None:
        raise BudgetError("give --rank (the highest rank of any module) or --budget (the whole adapter), not both")
    size = budget_of_adapter(budget)
    if size.percent is not None:
        raise BudgetError(f"--budget {budget!r} is a part of the base model: give '50%' (of the sum), 8, 2M or 8MB")
    return size


def _own_configs(adapters: Sequence[Path]) -> list[Path]:
    """The configurations of the runs that the adapters are from; none if one of them is from elsewhere."""
    found = [adapter.resolve().parent / CONFIG for adapter in adapters]
    return found if all(config.is_file() for config in found) else []


def _kind_of_cut(by: str | None, tasks: Sequence[Path], *, cut: bool) -> str | None:
    if by not in (None, "balanced", "svd"):
        raise SettingsError(f"--by {by!r}: expected balanced or svd")
    if not cut:
        return None
    if by == "balanced" and not tasks:
        raise SettingsError(
            "--by balanced measures on data of all tasks: give --config for each, or folders of lorank train; "
            "without data, use --by svd"
        )
    return by or ("balanced" if tasks else "svd")


def _cut_balanced(
    whole: Path, out: Path, size: Budget, tasks: Sequence[Path], samples: int, progress: Any
) -> tuple[TaskLoss, ...]:
    loaded = [load_finished(whole, config=config) for config in tasks]
    first = loaded[0]
    before = [one.loss(samples) for one in loaded]
    resolved = size.resolve(first.layers)
    if resolved.fits(first.layers.ranks):
        raise BudgetError(
            f"the sum already fits the budget of {resolved.describe()}: leave the budget out, or give less"
        )
    batches = [batch for one in loaded for batch in gramian_batches(one, samples)]
    truncate_(first.model, first.layers, batches, resolved, stages=STAGES, progress=progress)
    save_adapter(first.layers, out)
    after = [one.reload(out).loss(samples) for one in loaded]
    return tuple(
        TaskLoss(_name(one), whole_loss, loss, len(one.held_apart(samples)))
        for one, whole_loss, loss in zip(loaded, before, after, strict=True)
    )


def _name(loaded: LoadedAdapter) -> str:
    return str(loaded.config.task.data)
