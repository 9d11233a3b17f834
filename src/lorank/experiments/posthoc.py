"""After training: smaller adapters with the best ranks of a trained adapter.

Any PEFT LoRA adapter works: a folder with adapter_config.json is enough. Nothing is trained, and the files that are
read are not changed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from lorank.allocators import Budget, ResolvedBudget, truncate_
from lorank.allocators.truncation import STAGES
from lorank.errors import BudgetError
from lorank.experiments.adapter_folder import (
    adapter_of_run,
    budget_of_adapter,
    check_budget_given,
    check_pruned_folder,
)
from lorank.experiments.adapter_session import LoadedAdapter
from lorank.experiments.errors import SettingsError
from lorank.experiments.scores import Scored, gramian_batches
from lorank.lora import (
    LayerPlan,
    LayersSnapshot,
    check_file_can_shrink,
    check_save_directory,
    read_adapter_config,
    resize_,
    save_adapter,
)
from lorank.training.summary import named_budget_text


@dataclass(frozen=True)
class Pruned:
    """A smaller adapter. What is measured on it is measured on its files, loaded onto a base model loaded anew.

    Args:
        folder: its folder.
        ranks: per module, (before, after).
        parameters: parameters in A and B, (before, after).
        loss: mean loss on validation examples that were not used for scoring, (before, after).
        examples: number of these examples.
        budget: the budget as text, which says of what a percentage is.
        predicted: by `balanced`, the increase of the loss that was predicted, summed over the stages; else None.
    """

    folder: Path
    ranks: Mapping[str, tuple[int, int]]
    parameters: tuple[int, int]
    loss: tuple[float, float]
    examples: int
    budget: str
    predicted: float | None = None


def prune(
    loaded: LoadedAdapter,
    scored: Scored,
    budget: Budget,
    out: str | Path,
    *,
    stages: int = STAGES,
    overwrite: bool = False,
    progress: Any = None,
    loss: float | None = None,
) -> Pruned:
    """Keeps the ranks with the highest scores that fit the budget, and saves them as a plain PEFT adapter.

    Scores by `balanced` are divided by the numbers that a rank has in its module. Then the adapter is cut in stages,
    and scored anew before each (:mod:`lorank.allocators.truncation`).

    Args:
        loaded: the adapter. Its model is pruned meanwhile and then restored, so that other budgets can follow.
        scored: its scores.
        budget: the budget of the smaller adapter.
        out: the folder for the smaller adapter.
        stages: by `balanced`, the number of stages, ≥ 1.
        overwrite: replace an adapter in `out`. The original is never replaced, and other files are never touched.
        progress: by `balanced`, called with (batches done, batches in all); or None.
        loss: the loss of the whole adapter on the examples that are held apart, if it was measured before.

    Raises:
        BudgetError: the adapter already fits the budget, or no adapter can fit it.
        AdapterError: `out` is the folder of the original, or it is not empty.
    """
    check_out(loaded.adapter, out, overwrite=overwrite)
    layers, before = loaded.layers, loaded.layers.ranks
    resolved = check_budget(loaded, budget)
    parameters = layers.parameters
    loss = loaded.loss(scored.samples) if loss is None else loss
    weights = [weight for layer in layers.values() for weight in (layer.A, layer.B)]
    snapshot = LayersSnapshot(layers, torch.optim.SGD(weights))  # a snapshot is of weights and an optimiser's state
    try:
        predicted = _cut_(loaded, scored, resolved, stages, progress)
        folder = save_adapter(layers, out)
    finally:
        snapshot.restore_()
    written = loaded.reload(folder)  # every figure is measured on the files
    return Pruned(
        folder=written.adapter,
        ranks={name: (rank, written.layers.ranks.get(name, 0)) for name, rank in before.items()},
        parameters=(parameters, written.layers.parameters),
        loss=(loss, written.loss(scored.samples)),
        examples=len(loaded.held_apart(scored.samples)),
        budget=named_budget_text(budget.named),
        predicted=predicted,
    )


def _cut_(loaded: LoadedAdapter, scored: Scored, budget: ResolvedBudget, stages: int, progress: Any) -> float | None:
    """Cuts the model in memory. Returns the predicted increase of the loss, by `balanced`."""
    if scored.balanced is None:
        kept = budget.keep_best(scored.scores)
        resize_(loaded.layers, {name: LayerPlan(indices) for name, indices in kept.items()})
        return None
    batches = gramian_batches(loaded, scored.samples)
    done = truncate_(
        loaded.model, loaded.layers, batches, budget, stages=stages, first=scored.balanced, progress=progress
    )
    return sum(stage.predicted for stage in done)


def folders_of(out: Path, budgets: Sequence[Budget]) -> list[Path]:
    """The folder of the smaller adapter of each budget: `out` itself for one budget, else folders in it.

    Raises:
        SettingsError: two budgets are the same.
    """
    if len(budgets) == 1:
        return [out]
    names = [re.sub(r"[^\w.]+", "_", named_budget_text(one.named).replace("%", "percent")) for one in budgets]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise SettingsError(f"--budget: two of the budgets are {twice.replace('_', ' ')}: give each once")
    return [out / name for name in names]


def pruning_budget(loaded: LoadedAdapter, spec: str | None, max_lora_rank: int | None = None) -> Budget:
    """The budget of `lorank prune`: `50%` means 50 % of the adapter's parameters, `0.32% of base` of the base model's.

    Args:
        loaded: the adapter.
        spec: the budget as text.
        max_lora_rank: the highest rank of any module, ≥ 1.

    Raises:
        BudgetError: no budget was given, or it cannot be read.
    """
    check_budget_given(spec, max_lora_rank)
    if spec is None:
        return Budget(max_lora_rank=max_lora_rank)
    budget = budget_of_adapter(spec)
    return budget if max_lora_rank is None else replace(budget, max_lora_rank=max_lora_rank)


def check_budget(loaded: LoadedAdapter, budget: Budget) -> ResolvedBudget:
    """Resolves the budget for this adapter, and checks that there is something to prune.

    Raises:
        BudgetError: the adapter already fits the budget, or no adapter can fit it.
    """
    resolved, ranks = budget.resolve(loaded.layers), loaded.layers.ranks
    if resolved.fits(ranks):
        used = ", ".join(f"{v['used']:.6g} of {v['limit']:.6g} {unit}" for unit, v in resolved.used(ranks).items())
        raise BudgetError(
            f"the adapter already fits the budget ({used}): there is nothing to prune. Give a smaller budget"
        )
    return resolved


def check_adapter(adapter: Path) -> None:
    """Checks, from its settings alone, that a smaller adapter can be made of an adapter.

    Args:
        adapter: the folder of an adapter, or of the run that made it.

    Raises:
        AdapterError: there is no LoRA adapter, or its initialisation changed the base weights.
    """
    check_file_can_shrink(read_adapter_config(adapter_of_run(adapter)).get("init_lora_weights"))


def check_out(adapter: Path, out: str | Path, *, overwrite: bool) -> None:
    """Checks that a new adapter may be written to `out`, before anything slow begins.

    Args:
        adapter: the folder of the original adapter, or of the run that made it.
        out: the folder for the new adapter.
        overwrite: an adapter in `out` may be replaced. Other files in `out` are never touched.

    Raises:
        AdapterError: `out` is the folder of the original, or it exists, is not empty and `overwrite` is False, or it
            holds other files and no adapter.
    """
    check_pruned_folder(adapter, Path(out), overwrite=overwrite)
    check_save_directory(Path(out))
