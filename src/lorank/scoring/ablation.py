"""AB-LoRA: what a rank is worth, by taking it away and by leaving it alone (ALoRA, Liu et al., arXiv 2403.16187).

    IS(r) = S(M) − S(M without r) + S(M with r alone)        S = −L, the negative cross-entropy on one fixed batch
          = [L(M without r) − L(M)] − L(r alone)

Higher means keep: losing the rank hurts, or the rank alone already helps. S(M) is the same for all ranks, so the order
is that of the paper's CS(r) = −S(M without r) + S(M with r alone).
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from lorank.lora.layer import AdapterLayers
from lorank.scoring.evaluation import Evaluator
from lorank.scoring.loss import LossFn, own_loss, prepare_batch, require_finite, unwrap_model
from lorank.scoring.microbatch import one_pass
from lorank.scoring.preserve_state import preserve_state
from lorank.scoring.variants import TERMS, Progress, Term, Terms, VariantLosses, every_rank
from lorank.scoring.work_sharding import Share


@dataclass(frozen=True)
class AblationResult:
    """Scores by ablation, and how they came about.

    Attributes:
        scores: one (r,) float64 tensor on the CPU per layer, higher = keep; empty for a layer of rank 0.
        baseline: L(M), the loss of the model as it is.
        evaluations: how many variants of the model were evaluated, M included (and the base, where it was needed).
        engine: what computed the scores, which is not always what was asked for: an engine, or gradients of the gates.
        notice: why it is not, or what else there is to say, else None.
        seconds: wall-clock time.
        backward_passes: how many backward passes over the batch were made, however many parts it ran in.
    """

    scores: dict[str, Tensor]
    baseline: float
    evaluations: int
    engine: Literal["exact", "reference", "gradients"]
    notice: str | None
    seconds: float
    backward_passes: int = 0


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

    ``terms`` says what counts, in losses L on the batch (S = −L):

    - ``both``: L(M without r) − L(M) − L(r alone), which is IS(r) of the paper;
    - ``without``: L(M without r) − L(M), zero for a rank that adds nothing;
    - ``alone``: L(base, all ranks off) − L(r alone), zero for a rank that adds nothing.

    The model is scored as it is used: in evaluation mode, without gradients, under the autocast that is on. A gate that
    a layer already has belongs to M. Everything is restored (:func:`~lorank.scoring.preserve_state.preserve_state`).

    Rounding: a single rank often changes the loss by 1e-4 or less, which 16-bit logits do not resolve. For ``without``
    prefer a model, or an autocast-free region, in float32.

    Args:
        model: the model, with or without ``torch.compile`` or ``DistributedDataParallel`` around it (scored uncompiled
            and in this process only).
        layers: its LoRA layers, from :func:`lorank.lora.find_layers`.
        batch: arguments of the model's forward with ``labels``; moved to the model's device.
        engine: ``exact`` gives the scores of ``reference`` (one whole forward per variant) in less time: blocks that a
            variant does not change are not run again, several variants share a forward, and only labelled positions get
            logits. Where that does not fit the model, the reference runs instead and ``notice`` says why.
        loss_fn: ``loss_fn(model, batch)`` → a scalar, in place of ``model(**batch).loss``; always by the reference.
        max_rows: at most so many samples in one forward (with the exact engine; a larger batch is then run in parts).
            Default: the batch whole; on a CPU stacked with more variants up to 1,024 tokens in all, elsewhere up to
            16,384, and to 2²⁸ logits.
        progress: called with (variants done, variants in all), those of this process.
        share: this process's share, where several hold the same model: each evaluates some of the variants, all get
            the same scores. None: this process evaluates them all.

    Raises:
        ValidationBatchError: the batch is empty, not a mapping of tensors or has no labels; there is no loss; or the
            loss of the model or of a variant, which is named, is not finite.
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
        losses = evaluate(every_rank(layers, TERMS[terms]), backgrounds)
    assert losses.full is not None
    return AblationResult(
        scores=scores_of(losses, layers, terms),
        baseline=losses.full,
        evaluations=evaluate.evaluations,
        engine=evaluate.engine,
        notice=evaluate.notice,
        seconds=time.perf_counter() - start,
    )


def check_terms(terms: str, max_rows: int | None) -> None:
    """Raises ValueError for options that no scorer knows."""
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
    first_look: bool = False,
) -> float:
    """L(M) on the batch, leaving no trace: what scoring will start from, and a check that the batch can be scored on.

    Args:
        first_look: of so many samples only as one pass of scoring takes, where the batch is larger. The batch of
            estimates has more of them than memory has room for at once.

    Raises:
        ValidationBatchError: as :func:`ablation_scores` would.
    """
    model = unwrap_model(model)
    inputs: Mapping[str, Any] = prepare_batch(model, batch, needs_labels=loss_fn is None)
    if first_look and loss_fn is None:
        inputs = one_pass(inputs)
    with preserve_state(model, layers):
        return require_finite(own_loss(model, inputs, loss_fn), "the model")


def scores_of(losses: VariantLosses, layers: AdapterLayers, terms: Terms) -> dict[str, Tensor]:
    """The scores, (r,) per layer, from the losses of the variants, M and, for ``alone``, the base."""
    scores: dict[str, Tensor] = {}
    for name in layers:
        if terms == "alone":
            assert losses.base is not None
            scores[name] = losses.base - losses.variants["alone"][name]
            continue
        assert losses.full is not None
        scores[name] = losses.variants["without"][name] - losses.full
        if terms == "both":  # IS(r), a constant S(M) included
            scores[name] = scores[name] - losses.variants["alone"][name]
    return scores
