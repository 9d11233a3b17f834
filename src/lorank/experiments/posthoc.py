"""After training: what each rank of a finished adapter is worth, and a smaller adapter made of the best of them.

The adapter may have been trained anywhere: a folder with adapter_config.json is enough. Nothing is trained here, and
what is read stays as it is.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

from torch import Tensor

from lorank.allocators import Budget, ResolvedBudget
from lorank.errors import AdapterError, BudgetError
from lorank.experiments.adapter_session import LoadedAdapter
from lorank.experiments.errors import SettingsError
from lorank.lora import LayerPlan, resize_, save_adapter
from lorank.scoring import ablation_scores, first_order_scores, saliency_scores, screened_scores
from lorank.tasks import mean_loss

By = Literal["ablation", "first_order", "screen", "saliency"]
Terms = Literal["both", "without", "alone"]
SENSITIVITY_BATCH = 4
"""Samples per gradient: small, so that gradients of different samples do not cancel."""
_OF_THE_ADAPTER = re.compile(r"\s*(\d+\.?\d*|\.\d+)\s*%(\s*of\s+(the\s+)?adapter)?\s*", re.IGNORECASE)


@dataclass(frozen=True)
class Scored:
    """Scores of all ranks.

    Args:
        scores: per module (r,), higher = keep.
        by: the kind of score.
        samples: how many validation examples they were computed on.
        loss: of the adapter as it is, on those.
        seconds: wall-clock time.
    """

    scores: Mapping[str, Tensor]
    by: By
    samples: int
    loss: float
    seconds: float


@dataclass(frozen=True)
class Pruned:
    """A smaller adapter.

    Args:
        folder: where it is.
        ranks: per module, (before, after).
        parameters: numbers in A and B, (before, after).
        loss: on validation examples held apart from scoring, (before, after).
        examples: how many those are.
    """

    folder: Path
    ranks: Mapping[str, tuple[int, int]]
    parameters: tuple[int, int]
    loss: tuple[float, float]
    examples: int


def score(
    opened: LoadedAdapter,
    *,
    by: By = "ablation",
    terms: Terms = "both",
    samples: int = 32,
    limits: ResolvedBudget | None = None,
    progress: Any = None,
) -> Scored:
    """What each rank is worth, on the first `samples` validation examples.

    Args:
        by: `ablation` (AB-LoRA: the loss without the rank and with it alone, an evaluation each), `first_order`
            (estimates of that by two backward passes), `screen` (both: evaluations until it is settled which ranks go)
            or `saliency` (the gradient of the loss with respect to a gate on the rank: one backward pass per four
            samples).
        terms: which terms of ablation count, or of its estimates.
        samples: ≥ 1.
        limits: the budget that says which ranks go, for `screen`.
        progress: called with (evaluations, or passes over the samples, done, in all), except for saliency.

    Raises:
        SettingsError: an unknown kind of score, no sample, or `screen` without a budget.
        ValidationBatchError: see `lorank.scoring`.
    """
    if by not in get_args(By):
        raise SettingsError(f"--by {by!r}: expected one of {', '.join(get_args(By))}")
    if terms not in get_args(Terms):
        raise SettingsError(f"--terms {terms!r}: expected one of {', '.join(get_args(Terms))}")
    if samples < 1:
        raise SettingsError(f"--samples {samples}: expected at least 1")
    if by == "screen" and limits is None:
        raise SettingsError(
            "--by screen evaluates ranks until it is settled which of them a budget prunes, and there is no budget "
            "here: use it with lorank prune, or score --by ablation or first_order"
        )
    task, began = opened.task, time.perf_counter()
    examples = task.validation[:samples]
    if by != "saliency":
        scorer: Any = ablation_scores if by == "ablation" else first_order_scores
        if by == "screen":
            assert limits is not None  # said above
            scorer = partial(screened_scores, choose=partial(_pruned_by, limits))
        result = scorer(opened.model, opened.layers, task.collator(examples), terms=terms, progress=progress)
        scores, loss = result.scores, result.baseline
    else:
        parts = [examples[start : start + SENSITIVITY_BATCH] for start in range(0, len(examples), SENSITIVITY_BATCH)]
        scores = saliency_scores(opened.model, opened.layers, (task.collator(part) for part in parts))
        loss = mean_loss(opened.model, examples, task.collator, batch_size=opened.batch_size, progress=False)
    return Scored(scores, by, len(examples), loss, time.perf_counter() - began)


def _pruned_by(limits: ResolvedBudget, scores: Mapping[str, Tensor]) -> list[tuple[str, int]]:
    """The ranks that a budget has no room for, (module, index)."""
    kept = limits.keep_best(scores)
    return [(name, k) for name, values in scores.items() for k in range(len(values)) if k not in kept[name]]


def prune(opened: LoadedAdapter, scored: Scored, budget: Budget, out: str | Path, *, overwrite: bool = False) -> Pruned:
    """Keeps the ranks with the highest scores that fit the budget, and saves them as a plain PEFT adapter.

    Args:
        opened: the adapter; in memory it is the smaller one afterwards.
        scored: its scores.
        budget: what the smaller adapter may cost.
        out: the folder for it.
        overwrite: replace an adapter that is there. The original is never replaced.

    Raises:
        BudgetError: the adapter already fits the budget, or no adapter could.
        AdapterError: `out` is the original, or holds something.
    """
    check_out(opened.adapter, out, overwrite=overwrite)
    layers, before = opened.layers, opened.layers.ranks
    limits = budget.resolve(layers)
    if limits.fits(before):
        used = ", ".join(f"{v['used']:.6g} of {v['limit']:.6g} {unit}" for unit, v in limits.used(before).items())
        raise BudgetError(
            f"the adapter already fits the budget ({used}): there is nothing to prune. Name a smaller one"
        )
    parameters = layers.parameters
    loss = opened.loss(scored.samples)
    resize_(layers, {name: LayerPlan(kept) for name, kept in limits.keep_best(scored.scores).items()})
    folder_written = save_adapter(layers, out)
    return Pruned(
        folder=folder_written,
        ranks={name: (before[name], rank) for name, rank in layers.ranks.items()},
        parameters=(parameters, layers.parameters),
        loss=(loss, opened.loss(scored.samples)),
        examples=len(opened.held_apart(scored.samples)),
    )


def pruning_budget(opened: LoadedAdapter, spec: str | None, max_lora_rank: int | None = None) -> Budget:
    """A budget as `lorank prune` takes it: `50%` is of the adapter itself, `0.32% of base` of the base model.

    Raises:
        BudgetError: none was given, or it cannot be read.
    """
    if spec is None and max_lora_rank is None:
        raise BudgetError("name a budget: --budget 50% (of the adapter), 0.32% of base, 8, 120 ranks, 2M or 8MB")
    if spec is None:
        return Budget(max_lora_rank=max_lora_rank)
    own = _OF_THE_ADAPTER.fullmatch(spec)
    if own:
        share = float(own[1])
        if not 0 < share < 100:
            raise BudgetError(f"--budget {spec!r}: expected more than 0 and less than 100 per cent of the adapter")
        parameters = math.floor(opened.layers.parameters * share / 100 + 1e-6)
        if not parameters:
            raise BudgetError(f"--budget {spec!r} of {opened.layers.parameters} parameters is nothing")
        budget = Budget(parameters=parameters)
    else:
        budget = Budget.parse(spec)
    return budget if max_lora_rank is None else replace(budget, max_lora_rank=max_lora_rank)


def check_budget(opened: LoadedAdapter, budget: Budget) -> ResolvedBudget:
    """The budget's limits for this adapter, if there is something to prune.

    Raises:
        BudgetError: the adapter already fits, or no adapter could.
    """
    limits, ranks = budget.resolve(opened.layers), opened.layers.ranks
    if limits.fits(ranks):
        used = ", ".join(f"{v['used']:.6g} of {v['limit']:.6g} {unit}" for unit, v in limits.used(ranks).items())
        raise BudgetError(f"the adapter already fits the budget ({used}): nothing to prune. Name a smaller one")
    return limits


def check_out(adapter: Path, out: str | Path, *, overwrite: bool) -> None:
    """Whether a new adapter may be written to `out`; asked before anything slow begins."""
    out = Path(out)
    if out.resolve() == adapter.resolve():
        raise AdapterError(f"--out {out} is the adapter itself, which stays as it is: name another folder")
    if out.exists() and not overwrite and (not out.is_dir() or any(out.iterdir())):
        raise AdapterError(
            f"--out {out} is there already: name a new folder, or replace the adapter in it (--overwrite)"
        )
