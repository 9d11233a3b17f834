"""Scores of the ranks of a trained adapter: what each is worth on validation examples.

Most scores are of the ranks as they were trained. Balanced truncation first turns every module to the basis in which
what its ranks are worth has an answer (:mod:`lorank.scoring.balanced`), and scores the ranks of that basis.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from lorank.allocators import ResolvedBudget
from lorank.experiments.adapter_session import LoadedAdapter
from lorank.experiments.errors import SettingsError
from lorank.scoring import (
    Balanced,
    ablation_scores,
    balanced_scores,
    first_order_scores,
    saliency_scores,
    screened_scores,
)
from lorank.scoring.preserve_state import preserve_state
from lorank.tasks import mean_loss

By = Literal["balanced", "ablation", "first_order", "screen", "saliency"]
Terms = Literal["both", "without", "alone"]
SALIENCY_BATCH = 4
"""Samples per gradient: few, so that gradients of different samples do not cancel."""
BALANCED_BATCH = 8
"""Samples per pass for Gramians, which do not depend on it."""


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
        terms: by ablation and its estimates, the terms that count.
        without: per module (r,), what the loss rises by if the rank is taken away: Δloss, L(M without r) − L(M). By
            `balanced`, the prediction ½ σ². None if it is not known (`saliency`, `screen`, only the other term).
        alone: per module (r,), what the loss falls by if the rank is put alone on the base model; or None.
    """

    scores: Mapping[str, Tensor]
    by: By
    samples: int
    loss: float
    seconds: float
    balanced: Mapping[str, Balanced] | None = None
    terms: Terms = "both"
    without: Mapping[str, Tensor] | None = None
    alone: Mapping[str, Tensor] | None = None


@dataclass(frozen=True)
class Slow:
    """What exact ablation would cost.

    Args:
        evaluations: the number of evaluations of the model.
        seconds: the longest that they take, from the time of one forward pass. Evaluations that share computations, as
            `ablation` has them, take less.
    """

    evaluations: int
    seconds: float


def score(
    loaded: LoadedAdapter,
    *,
    by: By = "first_order",
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
    without: Mapping[str, Tensor] | None = None
    alone: Mapping[str, Tensor] | None = None
    if by == "balanced":
        balanced = balanced_scores(loaded.model, loaded.layers, gramian_batches(loaded, samples), progress=progress)
        scores = {name: one.worth for name, one in balanced.items()}
        without = {name: worth / 2 for name, worth in scores.items()}
        loss = mean_loss(loaded.model, examples, task.collator, batch_size=loaded.batch_size, progress=False)
    elif by != "saliency":
        scorer: Any = ablation_scores if by == "ablation" else first_order_scores
        if by == "screen":
            assert budget is not None  # checked above
            scorer = partial(screened_scores, choose=partial(_pruned_by, budget))
        batch = task.collator(examples)
        result = scorer(loaded.model, loaded.layers, batch, terms=terms, progress=progress)
        scores, loss = result.scores, result.baseline
        if result.losses is not None:
            found = result.losses.variants
            if "without" in found:
                without = {name: losses - loss for name, losses in found["without"].items()}
            if "alone" in found:
                empty = result.losses.base
                empty = _loss_without_ranks(loaded, batch) if empty is None else empty
                alone = {name: empty - losses for name, losses in found["alone"].items()}
    else:
        parts = [examples[start : start + SALIENCY_BATCH] for start in range(0, len(examples), SALIENCY_BATCH)]
        scores = saliency_scores(loaded.model, loaded.layers, (task.collator(part) for part in parts))
        loss = mean_loss(loaded.model, examples, task.collator, batch_size=loaded.batch_size, progress=False)
    return Scored(scores, by, len(examples), loss, time.perf_counter() - began, balanced, terms, without, alone)


def slow_estimate(loaded: LoadedAdapter, samples: int, terms: Terms) -> Slow:
    """What exact ablation costs at most: the time of one forward pass of all examples, for every evaluation.

    Args:
        loaded: the adapter; it is not changed.
        samples: number of examples, ≥ 1.
        terms: the terms of ablation: `both` needs two evaluations per rank.
    """
    evaluations = 1 + loaded.layers.total_rank * (2 if terms == "both" else 1)
    examples = loaded.task.validation[:samples]
    began = time.perf_counter()
    mean_loss(loaded.model, examples, loaded.task.collator, batch_size=loaded.batch_size, progress=False)
    return Slow(evaluations, evaluations * (time.perf_counter() - began))


def _loss_without_ranks(loaded: LoadedAdapter, batch: Mapping[str, Any]) -> float:
    """The loss of the base model, with all that the adapter trains beside its ranks (a classifier's head)."""
    with preserve_state(loaded.model, loaded.layers):
        for layer in loaded.layers.values():
            layer.gate = torch.zeros(layer.rank, dtype=layer.A.dtype, device=layer.A.device)  # (r,)
        device = next(loaded.model.parameters()).device
        return float(loaded.model(**{name: value.to(device) for name, value in batch.items()}).loss)


def gramian_batches(loaded: LoadedAdapter, samples: int) -> list[Mapping[str, Any]]:
    """The first `samples` validation examples, in batches for Gramians."""
    examples = loaded.task.validation[:samples]
    parts = [examples[start : start + BALANCED_BATCH] for start in range(0, len(examples), BALANCED_BATCH)]
    return [loaded.task.collator(part) for part in parts]


def _pruned_by(budget: ResolvedBudget, scores: Mapping[str, Tensor]) -> list[tuple[str, int]]:
    """The ranks that exceed a budget, (module, index)."""
    kept = budget.keep_best(scores)
    return [(name, k) for name, values in scores.items() for k in range(len(values)) if k not in kept[name]]
