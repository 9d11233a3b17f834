"""After training: scores of the ranks of a trained adapter, and a smaller adapter with the best ranks.

Most scores are of the ranks as they were trained. Balanced truncation first turns every module to the basis in which
what its ranks are worth has an answer (:mod:`lorank.scoring.balanced`), and scores the ranks of that basis.

Any PEFT LoRA adapter works: a folder with adapter_config.json is enough. Nothing is trained, and the files that are
read are not changed.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

from torch import Tensor

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
from lorank.lora import (
    LayerPlan,
    check_file_can_shrink,
    check_save_directory,
    read_adapter_config,
    resize_,
    save_adapter,
)
from lorank.scoring import (
    Balanced,
    ablation_scores,
    balanced_scores,
    first_order_scores,
    saliency_scores,
    screened_scores,
)
from lorank.tasks import mean_loss

By = Literal["balanced", "ablation", "first_order", "screen", "saliency"]
Terms = Literal["both", "without", "alone"]
SALIENCY_BATCH = 4
"""Samples per gradient: few, so that gradients of different samples do not cancel."""
BALANCED_BATCH = 8
"""Samples per pass for Gramians, which do not depend on it."""
SCORES_BEGIN = b'{\n  "adapter": '
"""The first bytes of a file with scores."""


@dataclass(frozen=True)
class Scored:
    """Scores of all ranks.

    Args:
        scores: per module (r,), higher = keep. By `balanced`, they are σ² of the ranks of the balanced basis, which are
            other ranks than the adapter's own, descending.
        by: the kind of score.
        samples: number of validation examples used.
        loss: mean loss of the unchanged adapter on these examples.
        seconds: wall-clock time.
        balanced: by `balanced`, the bases; else None.
    """

    scores: Mapping[str, Tensor]
    by: By
    samples: int
    loss: float
    seconds: float
    balanced: Mapping[str, Balanced] | None = None


@dataclass(frozen=True)
class Pruned:
    """A smaller adapter. What is measured on it is measured on its files, loaded onto a base model loaded anew.

    Args:
        folder: its folder.
        ranks: per module, (before, after).
        parameters: parameters in A and B, (before, after).
        loss: mean loss on validation examples that were not used for scoring, (before, after).
        examples: number of these examples.
        predicted: by `balanced`, the increase of the loss that was predicted, summed over the stages; else None.
    """

    folder: Path
    ranks: Mapping[str, tuple[int, int]]
    parameters: tuple[int, int]
    loss: tuple[float, float]
    examples: int
    predicted: float | None = None


def score(
    loaded: LoadedAdapter,
    *,
    by: By = "ablation",
    terms: Terms = "both",
    samples: int = 32,
    budget: ResolvedBudget | None = None,
    progress: Any = None,
) -> Scored:
    """Scores each rank on the first `samples` validation examples.

    Args:
        loaded: the adapter; it is not changed.
        by: `balanced` (σ² in the balanced basis: twice the loss that taking the rank away is predicted to cost; two
            backward passes per eight samples), `ablation` (AB-LoRA: the loss without the rank and the loss with the
            rank alone, one evaluation each), `first_order` (estimates of ablation from two backward passes), `screen`
            (both: estimates, then evaluations until the ranks to prune are certain) or `saliency` (the gradient of the
            loss with respect to a gate on the rank: one backward pass per four samples).
        terms: the terms of ablation, or of its estimates, to use: `both`, `without` or `alone`.
        samples: number of examples, ≥ 1.
        budget: the budget that decides which ranks are pruned; needed for `screen`.
        progress: called with (done, total), evaluations or passes over the samples; not for saliency.

    Raises:
        SettingsError: the kind of score is unknown, `samples` is below 1, or `screen` has no budget.
        ValidationBatchError: see `lorank.scoring`.
    """
    if by not in get_args(By):
        raise SettingsError(f"--by {by!r}: expected one of {', '.join(get_args(By))}")
    if terms not in get_args(Terms):
        raise SettingsError(f"--terms {terms!r}: expected one of {', '.join(get_args(Terms))}")
    if samples < 1:
        raise SettingsError(f"--samples {samples}: expected at least 1")
    if by == "screen" and budget is None:
        raise SettingsError(
            "--by screen needs a budget, because it evaluates ranks until the ranks to prune are certain: use it with "
            "lorank prune, or score --by ablation or first_order"
        )
    task, began = loaded.task, time.perf_counter()
    examples = task.validation[:samples]
    balanced: Mapping[str, Balanced] | None = None
    if by == "balanced":
        balanced = balanced_scores(loaded.model, loaded.layers, gramian_batches(loaded, samples), progress=progress)
        scores = {name: one.worth for name, one in balanced.items()}
        loss = mean_loss(loaded.model, examples, task.collator, batch_size=loaded.batch_size, progress=False)
    elif by != "saliency":
        scorer: Any = ablation_scores if by == "ablation" else first_order_scores
        if by == "screen":
            assert budget is not None  # checked above
            scorer = partial(screened_scores, choose=partial(_pruned_by, budget))
        result = scorer(loaded.model, loaded.layers, task.collator(examples), terms=terms, progress=progress)
        scores, loss = result.scores, result.baseline
    else:
        parts = [examples[start : start + SALIENCY_BATCH] for start in range(0, len(examples), SALIENCY_BATCH)]
        scores = saliency_scores(loaded.model, loaded.layers, (task.collator(part) for part in parts))
        loss = mean_loss(loaded.model, examples, task.collator, batch_size=loaded.batch_size, progress=False)
    return Scored(scores, by, len(examples), loss, time.perf_counter() - began, balanced)


def gramian_batches(loaded: LoadedAdapter, samples: int) -> list[Mapping[str, Any]]:
    """The first `samples` validation examples, in batches for Gramians."""
    examples = loaded.task.validation[:samples]
    parts = [examples[start : start + BALANCED_BATCH] for start in range(0, len(examples), BALANCED_BATCH)]
    return [loaded.task.collator(part) for part in parts]


def _pruned_by(budget: ResolvedBudget, scores: Mapping[str, Tensor]) -> list[tuple[str, int]]:
    """The ranks that exceed a budget, (module, index)."""
    kept = budget.keep_best(scores)
    return [(name, k) for name, values in scores.items() for k in range(len(values)) if k not in kept[name]]


def prune(
    loaded: LoadedAdapter,
    scored: Scored,
    budget: Budget,
    out: str | Path,
    *,
    stages: int = STAGES,
    overwrite: bool = False,
    progress: Any = None,
) -> Pruned:
    """Keeps the ranks with the highest scores that fit the budget, and saves them as a plain PEFT adapter.

    Scores by `balanced` are divided by the numbers that a rank has in its module. Then the adapter is cut in stages,
    and scored anew before each (:mod:`lorank.allocators.truncation`).

    Args:
        loaded: the adapter; the model in memory is pruned.
        scored: its scores.
        budget: the budget of the smaller adapter.
        out: the folder for the smaller adapter.
        stages: by `balanced`, the number of stages, ≥ 1.
        overwrite: replace an adapter in `out`. The original is never replaced, and other files are never touched.
        progress: by `balanced`, called with (batches done, batches in all); or None.

    Raises:
        BudgetError: the adapter already fits the budget, or no adapter can fit it.
        AdapterError: `out` is the folder of the original, or it is not empty.
    """
    check_out(loaded.adapter, out, overwrite=overwrite)
    layers, before = loaded.layers, loaded.layers.ranks
    resolved = check_budget(loaded, budget)
    parameters = layers.parameters
    loss = loaded.loss(scored.samples)
    predicted = None
    if scored.balanced is not None:
        batches = gramian_batches(loaded, scored.samples)
        done = truncate_(
            loaded.model, layers, batches, resolved, stages=stages, first=scored.balanced, progress=progress
        )
        predicted = sum(stage.predicted for stage in done)
    else:
        resize_(layers, {name: LayerPlan(kept) for name, kept in resolved.keep_best(scored.scores).items()})
    written = loaded.reload(save_adapter(layers, out))  # every figure is measured on the files
    return Pruned(
        folder=written.adapter,
        ranks={name: (rank, written.layers.ranks.get(name, 0)) for name, rank in before.items()},
        parameters=(parameters, written.layers.parameters),
        loss=(loss, written.loss(scored.samples)),
        examples=len(loaded.held_apart(scored.samples)),
        predicted=predicted,
    )


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


def check_scores_file(out: Path) -> None:
    """Checks, before anything slow begins, that the scores may be written to `out`.

    Raises:
        SettingsError: `out` is a folder, or a file that does not hold scores.
    """
    if not out.exists():
        return
    if out.is_dir():
        raise SettingsError(f"--out {out} is a folder: name a file, e.g. {out / 'scores.json'}")
    with out.open("rb") as file:
        theirs = not file.read(len(SCORES_BEGIN)).startswith(SCORES_BEGIN)
    if theirs:
        raise SettingsError(f"--out {out} exists and does not hold scores: name another file, or remove this one first")


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
