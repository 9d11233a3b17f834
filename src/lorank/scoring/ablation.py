"""AB-LoRA: the score of a rank by ablation (ALoRA, Liu et al., arXiv 2403.16187).

One variant of the model lacks the rank; another has this rank alone.

    IS(r) = S(M) − S(M without r) + S(M with r alone)        S = −L, the negative cross-entropy on one fixed batch
          = [L(M without r) − L(M)] − L(r alone)

Higher means keep: the model without the rank is worse, or the rank alone already helps. S(M) is the same for all ranks,
so IS orders ranks as the paper's CS(r) = −S(M without r) + S(M with r alone) does.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

from torch import Tensor, nn

from lorank.lora.layer import AdapterLayers
from lorank.scoring.ablation_variants import (
    TERMS,
    Progress,
    Term,
    Terms,
    VariantLosses,
    all_variants,
    layers_with_ranks,
)
from lorank.scoring.evaluation import Evaluator
from lorank.scoring.loss import LossFn, detached_loss, prepare_batch, require_finite, unwrap_model
from lorank.scoring.microbatch import first_pass
from lorank.scoring.preserve_state import preserve_state
from lorank.scoring.work_sharding import Share


@dataclass(frozen=True)
class AblationResult:
    """Scores by ablation, and how they were computed.

    Attributes:
        scores: one (r,) float64 tensor on the CPU per layer, higher = keep; empty for a layer of rank 0.
        baseline: L(M), the loss of the unchanged model.
        evaluations: number of variants of the model that were evaluated, M included (and the base model, if needed).
        engine: what computed the scores: an engine or gradients of the gates. It may differ from the requested engine.
        notice: why the requested engine was not used, or another remark on the scoring; None if there is none.
        seconds: wall-clock time.
        backward_passes: number of backward passes over the whole batch; splitting the batch does not change it.
        losses: the losses of the variants, of which the scores are made; None for screening, which has some of them.
    """

    scores: dict[str, Tensor]
    baseline: float
    evaluations: int
    engine: Literal["exact", "reference", "gradients"]
    notice: str | None
    seconds: float
    backward_passes: int = 0
    losses: VariantLosses | None = None


def ablation_scores(
    model: nn.Module,
    layers: AdapterLayers,
    batch: Mapping[str, Tensor],
    *,
    terms: Terms = "both",
    engine: Literal["exact", "reference"] = "exact",
    loss_fn: LossFn | None = None,
    max_rows: int | None = None,
    progress: Progress | None = None,
    share: Share | None = None,
) -> AblationResult:
    """Scores every rank of every layer by ablation.

    ``terms`` selects the terms of the score, in losses L on the batch (S = −L):

    - ``both``: L(M without r) − L(M) − L(r alone), the paper's IS(r);
    - ``without``: L(M without r) − L(M), zero for a rank that adds nothing;
    - ``alone``: L(base, all ranks off) − L(r alone), zero for a rank that adds nothing.

    The model is scored in evaluation mode, without gradients, under the autocast setting of the caller. A gate that a
    layer already has is part of M. Afterwards the model is restored
    (:func:`~lorank.scoring.preserve_state.preserve_state`).

    Rounding: a single rank often changes the loss by 1e-4 or less, which 16-bit logits do not resolve. For ``without``,
    use a float32 model, or call this outside autocast.

    Args:
        model: the model, with or without ``torch.compile`` or ``DistributedDataParallel`` around it. The inner model is
            scored, uncompiled and in this process only.
        layers: its LoRA layers, from :func:`lorank.lora.find_layers`.
        batch: arguments of the model's forward with ``labels``; moved to the model's device.
        engine: ``reference`` runs one whole forward pass per variant. ``exact`` gives the same scores in less time:
            blocks that a variant does not change are not run again, several variants share a forward pass, and only
            labelled positions get logits. If the exact engine does not support the model, the reference engine runs
            instead and ``notice`` gives the reason.
        loss_fn: ``loss_fn(model, batch)`` → a scalar, in place of ``model(**batch).loss``. The reference engine runs.
        max_rows: the most samples in one forward pass of the exact engine; a larger batch is run in parts.
            Default: the batch is run whole; on a CPU stacked with more variants up to 1,024 tokens in all, elsewhere
            up to 16,384, and to 2²⁸ logits.
        progress: called with (variants done, variants in all) of this process.
        share: this process's share of the work, if several processes hold the same model: each evaluates some of the
            variants, and all get the same scores. None: this process evaluates all variants.

    Raises:
        ValidationBatchError: the batch is empty, not a mapping of tensors or has no labels; there is no loss; or the
            loss of the model or of a variant is NaN or infinite. The message names the variant.
        AdapterError: a layer has a gate per sample.
        ValueError: an unknown ``terms`` or ``engine``, or ``max_rows`` below 1.
    """
    check_terms(terms, max_rows)
    if engine not in ("exact", "reference"):
        raise ValueError(f"engine is {engine!r}; expected 'exact' or 'reference'")
    start = time.perf_counter()
    model = unwrap_model(model)
    inputs = prepare_batch(model, batch, needs_labels=loss_fn is None)
    backgrounds: tuple[Term, ...] = ("without", "alone") if terms == "alone" else ("without",)
    with preserve_state(model, layers):
        evaluate = Evaluator(
            model,
            layers,
            inputs,
            engine=engine,
            loss_fn=loss_fn,
            max_rows=max_rows,
            share=share,
            progress=progress,
        )
        losses = evaluate(all_variants(layers, TERMS[terms]), backgrounds)
    assert losses.full is not None
    return AblationResult(
        scores=scores_of(losses, layers, terms),
        baseline=losses.full,
        evaluations=evaluate.evaluations,
        engine=evaluate.engine,
        notice=evaluate.notice,
        seconds=time.perf_counter() - start,
        losses=losses,
    )


def try_ablation(
    model: nn.Module,
    layers: AdapterLayers,
    batch: Mapping[str, Tensor],
    *,
    terms: Terms = "both",
    engine: Literal["exact", "reference"] = "exact",
    loss_fn: LossFn | None = None,
) -> None:
    """Evaluates the first variants of :func:`ablation_scores` in this process, so that a mistake shows before training.

    The model is restored afterwards.

    Raises:
        ValidationBatchError: in the same cases as :func:`ablation_scores`.
    """
    check_terms(terms, None)
    model = unwrap_model(model)
    inputs = prepare_batch(model, batch, needs_labels=loss_fn is None)
    first = {name: [0] for name, _ in islice(layers_with_ranks(layers), 1)}
    with preserve_state(model, layers):
        evaluate = Evaluator(
            model, layers, inputs, engine=engine, loss_fn=loss_fn, max_rows=None, share=None, progress=None
        )
        backgrounds: tuple[Term, ...] = ("without",)
        evaluate(dict.fromkeys(TERMS[terms], first), backgrounds)


def check_terms(terms: str, max_rows: int | None) -> None:
    """Raises ValueError if ``terms`` is unknown or ``max_rows`` is below 1."""
    if terms not in TERMS:
        raise ValueError(f"terms is {terms!r}; expected one of {', '.join(map(repr, TERMS))}")
    if max_rows is not None and max_rows < 1:
        raise ValueError(f"max_rows is {max_rows}; expected at least 1, or None for the default")


def validation_loss(
    model: nn.Module,
    layers: AdapterLayers,
    batch: Mapping[str, Any],
    loss_fn: LossFn | None = None,
    *,
    one_pass: bool = False,
) -> float:
    """L(M) on the batch; the model is left as it was. Also checks that ranks can be scored on the batch.

    Args:
        one_pass: whether only as many samples are used as one pass of scoring takes. The batch of first-order estimates
            may have more samples than memory can hold at once.

    Raises:
        ValidationBatchError: in the same cases as :func:`ablation_scores`.
    """
    model = unwrap_model(model)
    inputs: Mapping[str, Any] = prepare_batch(model, batch, needs_labels=loss_fn is None)
    if one_pass and loss_fn is None:
        inputs = first_pass(inputs)
    with preserve_state(model, layers):
        return require_finite(detached_loss(model, inputs, loss_fn), "the model")


def scores_of(losses: VariantLosses, layers: AdapterLayers, terms: Terms) -> dict[str, Tensor]:
    """The scores, (r,) per layer, from the losses of the variants, of M and, for ``alone``, of the base model."""
    scores: dict[str, Tensor] = {}
    for name in layers:
        if terms == "alone":
            assert losses.base is not None
            scores[name] = losses.base - losses.variants["alone"][name]
            continue
        assert losses.full is not None
        scores[name] = losses.variants["without"][name] - losses.full
        if terms == "both":  # IS(r), including the constant S(M)
            scores[name] = scores[name] - losses.variants["alone"][name]
    return scores
