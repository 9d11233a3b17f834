"""First-order (Taylor) estimates of ablation: two backward passes score every rank.

A mask m multiplies the gates of the model, y = W x + s · B (m ⊙ g ⊙ (A x)). L is the mean cross-entropy over the labels
of one batch, as in ablation. The path m = t · 1 leads from the base model (t = 0) to the model itself (t = 1). At each
point of the path, one forward and one backward pass give L and ∂L/∂m_r for every rank. Then

    L(M without r)  ≈  L(M)    − ∂L/∂m_r at m = 1
    L(r alone)      ≈  L(base) + ∂L/∂m_r at m = 0

and the scores follow from these losses as they follow from exact losses (:mod:`lorank.scoring.ablation`). The cost does
not depend on the number of ranks, so a batch of hundreds of samples is affordable. Such a batch has less sampling
noise, which may make up for the error of the estimate.

A large batch runs in parts. The loss of each part is weighted by its number of labels, so that the sum of the gradients
is the gradient of the whole batch's loss. Sums are in float64.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lorank.lora.layer import AdapterLayers
from lorank.scoring.ablation import AblationResult, check_terms, scores_of
from lorank.scoring.ablation_variants import (
    TERMS,
    Gates,
    IncompatibleError,
    Progress,
    Term,
    Terms,
    VariantLosses,
    layers_with_ranks,
)
from lorank.scoring.loss import (
    LossFn,
    base_of,
    forward_arguments,
    logits_of,
    loss_gradients,
    loss_of,
    loss_with_graph,
    prepare_batch,
    require_finite,
    unwrap_model,
)
from lorank.scoring.microbatch import (
    TOKENS_PER_PASS,
    count_labels,
    count_samples,
    exceeds_one_pass,
    has_one_row_per_sample,
    repeat_batch,
    split_into_passes,
)
from lorank.scoring.preserve_state import preserve_state
from lorank.scoring.targets import Form, Head, Targets, find_form, find_head, output_embedding
from lorank.scoring.work_sharding import Share, exchange, own_items

T = TypeVar("T")
logger = logging.getLogger("lorank")

PROBE_SAMPLES = 4
"""Samples in the forward pass that finds the form of the model's loss."""
SPLIT_TOLERANCE = 5e-3
"""How far the loss may move when samples run in smaller parts, relative to the loss. Rounding in 16 bits is smaller."""


@dataclass(frozen=True)
class Gradient:
    """The loss and its gradient at one point of the path.

    Attributes:
        loss: L.
        gradient: ∂L/∂m_r per layer, (r,) float64 on the CPU.
    """

    loss: float
    gradient: dict[str, Tensor]


class GatePath:
    """Computes gradients of the mask on the path m = t · 1.

    Used inside :func:`~lorank.scoring.preserve_state.preserve_state`.

    Args:
        batch: on the model's device.
        loss_fn: replaces the model's loss; the batch then runs in one pass.
        max_rows: the most samples in one pass; None: up to ``TOKENS_PER_PASS`` tokens.
        share: this process's share: each process takes some of the samples. None: this process takes all samples.

    Attributes:
        notice: why a batch that is too large for one pass is not split; None if it is split or small enough.
        passes: number of backward passes over the whole batch.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: AdapterLayers,
        batch: Mapping[str, Any],
        *,
        loss_fn: LossFn | None,
        max_rows: int | None,
        share: Share | None,
    ) -> None:
        self.layers, self.model, self.batch, self.loss_fn, self.share = layers, model, batch, loss_fn, share
        self.gates = Gates(layers)
        self.notice: str | None = None
        self.passes = 0
        self._head: Head | None = None
        self._form: Form | None = None
        self._parts: list[Mapping[str, Any]] = [batch]
        try:
            if loss_fn is not None:
                raise IncompatibleError("loss_fn may weight its samples in any way")
            self._form, self._head, trim = _find_form_and_head(model, batch)
            self._parts = _parts(batch, max_rows, share, trim)
            self._count = Targets.of(self._form, batch["labels"]).count
        except IncompatibleError as reason:
            self._run_whole(reason, exceeds_one_pass(batch, max_rows))

    def _run_whole(self, reason: Exception, notable: bool) -> None:
        """Runs the whole batch in one pass from now on, with the model's own loss."""
        self._form, self._head, self._parts = None, None, [self.batch]
        if notable:
            self.notice = f"all samples run in one backward pass: the batch cannot be split, because {reason}"
            logger.warning(self.notice)

    def at(self, t: float) -> Gradient:
        """The loss and its gradient at m = t · 1.

        Raises:
            ValidationBatchError: the loss is NaN or infinite.
        """
        found = self._or_whole(lambda: self._evaluate(t))  # (1 + R,)
        self.passes += 1
        loss = require_finite(float(found[0]), "the model" if t == 1 else f"the model with all gates at {t:g}")
        values = torch.split(found[1:], list(self.layers.ranks.values()))
        return Gradient(loss, dict(zip(self.layers, values, strict=True)))

    def try_out(self) -> None:
        """Runs one part of the batch forward and backward, as :meth:`at` will, in this process only.

        Raises:
            ValidationBatchError: the loss is NaN or infinite, or it has no gradient.
        """
        found = self._or_whole(lambda: self._gradient(1.0, self._parts[:1]))
        require_finite(found[0], "the model")

    def _or_whole(self, compute: Callable[[], T]) -> T:
        """``compute()``; if the model raises an error for a part of the batch, ``compute()`` on the whole batch.

        All processes do the same, because all of them learn that one has failed.
        """
        try:
            return compute()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            if self._form is None:
                raise
            self._run_whole(IncompatibleError(f"its forward raised {type(error).__name__}: {error}"), True)
            return compute()

    def _evaluate(self, t: float) -> Tensor:
        """The loss and its gradient over all processes, (1 + R,): [L, ∂L/∂m_1, …]."""
        length = 1 + self.layers.total_rank
        rows = exchange(lambda: self._gradient(t, self._parts), length, self.share)  # (processes, 1 + R)
        # If the samples cannot be split, every process has used all of them, and any row holds the result.
        return rows.sum(0) / self._count if self._form is not None else rows[0]

    def _gradient(self, t: float, parts: Sequence[Mapping[str, Any]]) -> list[float]:
        """[L, ∂L/∂m_1, …], summed over the labels of ``parts``; the mean if the form of the loss is unknown."""
        names = [name for name, _ in layers_with_ranks(self.layers)]
        own = [self.gates.ones(name) for name in names]  # (r,) each
        # In float32 at least: autograd sums a gradient in its own dtype, and 16 bits would lose precision.
        leaves = [(t * g).to(torch.promote_types(g.dtype, torch.float32)).requires_grad_() for g in own]
        sums = [torch.zeros(len(g), dtype=torch.float64) for g in own]
        total = 0.0
        for name, leaf in zip(names, leaves, strict=True):
            self.layers[name].gate = leaf
        try:
            with torch.enable_grad():
                for part in parts:
                    loss = self._loss(part)
                    total += float(loss.detach())
                    if not math.isfinite(total):
                        break  # require_finite raises the error, in all processes
                    for index, gradient in enumerate(loss_gradients(loss, leaves)):
                        if gradient is not None:  # None: the loss of this part does not depend on this layer
                            sums[index] += gradient.double().cpu()
        finally:
            for name in names:
                self.layers[name].gate = self.gates.own[name]
        return [total, *torch.cat([g.double().cpu() * s for g, s in zip(own, sums, strict=True)]).tolist()]

    def _loss(self, part: Mapping[str, Any]) -> Tensor:
        """The loss summed over the labels if its form is known, else the model's own mean loss."""
        if self._form is None or self._head is None:
            return loss_with_graph(self.model, part, self.loss_fn)
        targets = Targets.of(self._form, part["labels"])
        return self._head.losses(self._head.arguments(part), targets, 1)[0]


def _find_form_and_head(model: nn.Module, batch: Mapping[str, Any]) -> tuple[Form, Head, bool]:
    """How to compute the loss of a part of the batch: found by forward passes of a few samples.

    Returns:
        The form of the model's loss, the head that computes its logits, and whether padding may be cut off.

    Raises:
        IncompatibleError: the model returns no loss; its loss is not the mean cross-entropy of its logits; or a sample
            has another loss when fewer samples run together.
    """
    rows = count_samples(batch)
    part = batch
    splits = has_one_row_per_sample(batch, rows)
    if splits:
        with_labels = [row for row in range(rows) if count_labels({"labels": batch["labels"][row : row + 1]})]
        chosen = torch.tensor(with_labels[:PROBE_SAMPLES])
        part = {key: value[chosen.to(value.device)] for key, value in batch.items()}
        part = repeat_batch(part, 2) if len(chosen) == 1 else part  # one sample looks like any axis of length 1
    embedding = output_embedding(base_of(model))
    shapes: list[torch.Size] = []
    handle = None
    if embedding is not None:
        handle = embedding.register_forward_pre_hook(lambda _, args: shapes.append(args[0].shape), prepend=True)
    try:
        output = model(**forward_arguments(model), **part)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # it may raise for a few samples what it does not raise for all
        raise IncompatibleError(f"its forward raised {type(error).__name__}: {error}") from error
    finally:
        if handle is not None:
            handle.remove()
    loss, logits = loss_of(output, part), logits_of(output)
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise IncompatibleError("its forward gives no loss under that name")
    require_finite(loss, "the model")
    form = find_form(logits, part["labels"], loss)
    targets = Targets.of(form, part["labels"])
    if form == "pooled" or len(shapes) != 1 or shapes[0][:-1] != part["labels"].shape:
        embedding = None
    head = find_head(model, part, targets, logits, embedding)
    trim = splits and _find_trim(head, part, targets, float(loss))
    return form, head, trim


def _find_trim(head: Head, part: Mapping[str, Any], targets: Targets, loss: float) -> bool:
    """Whether padding may be cut off when a batch is split: samples must have the same loss afterwards.

    Raises:
        IncompatibleError: a sample has another loss when fewer samples run together, even with all padding.
    """
    rows = torch.arange(count_samples(part))
    for trim in (True, False):
        try:
            total = 0.0
            for few in split_into_passes(part, rows, TOKENS_PER_PASS, -(-len(rows) // 2), trim=trim):
                total += float(head.losses(head.arguments(few), Targets.of(targets.form, few["labels"]), 1))
        except torch.OutOfMemoryError:
            raise
        except Exception:  # the model may raise anything for another length
            continue
        if abs(total / targets.count - loss) <= SPLIT_TOLERANCE * abs(loss):
            return trim
    raise IncompatibleError("a sample has another loss when fewer samples run together")


def _parts(batch: Mapping[str, Any], max_rows: int | None, share: Share | None, trim: bool) -> list[Mapping[str, Any]]:
    """This process's samples, in parts for one pass each.

    Raises:
        IncompatibleError: the batch cannot be split.
    """
    rows = count_samples(batch)
    if not has_one_row_per_sample(batch, rows):
        if share is None and not exceeds_one_pass(batch, max_rows):
            return [batch]
        raise IncompatibleError("some tensor of the batch does not have one row per sample")
    own = torch.tensor(own_items(range(rows), share), dtype=torch.long)
    return [*split_into_passes(batch, own, TOKENS_PER_PASS, max_rows, trim=trim)]


def first_order_scores(
    model: nn.Module,
    layers: AdapterLayers,
    batch: Mapping[str, Tensor],
    *,
    terms: Terms = "both",
    loss_fn: LossFn | None = None,
    max_rows: int | None = None,
    progress: Progress | None = None,
    share: Share | None = None,
) -> AblationResult:
    """Estimates the scores of :func:`~lorank.scoring.ablation_scores` from gradients of the gates.

    The model is scored in evaluation mode, under the autocast setting of the caller. Afterwards it is restored.

    Args:
        model, layers, batch, terms: as in :func:`~lorank.scoring.ablation_scores`.
        loss_fn: ``loss_fn(model, batch)`` → a scalar with a graph, in place of ``model(**batch).loss``; the batch then
            runs in one pass.
        max_rows: the most samples in one pass. Default: up to 2,048 tokens.
        progress: called with (passes over the batch done, passes in all).
        share: this process's share of the samples; None: all samples.

    Raises:
        ValidationBatchError: ranks cannot be scored on the batch, or a loss is NaN or infinite.
        AdapterError: a layer has a gate per sample.
        ValueError: an unknown ``terms``, or ``max_rows`` below 1.
    """
    check_terms(terms, max_rows)
    start = time.perf_counter()
    model = unwrap_model(model)
    inputs = prepare_batch(model, batch, needs_labels=loss_fn is None)
    with preserve_state(model, layers):
        path = GatePath(model, layers, inputs, loss_fn=loss_fn, max_rows=max_rows, share=share)
        losses = first_order_losses(path, TERMS[terms], progress)
    assert losses.full is not None
    return AblationResult(
        scores=scores_of(losses, layers, terms),
        baseline=losses.full,
        evaluations=0,
        engine="gradients",
        notice=path.notice,
        seconds=time.perf_counter() - start,
        backward_passes=path.passes,
        losses=losses,
    )


def try_first_order(
    model: nn.Module, layers: AdapterLayers, batch: Mapping[str, Tensor], *, loss_fn: LossFn | None = None
) -> None:
    """Runs the first pass of :func:`first_order_scores` in this process, so that a mistake shows before training.

    The model is restored afterwards.

    Raises:
        ValidationBatchError: in the same cases as :func:`first_order_scores`.
    """
    model = unwrap_model(model)
    inputs = prepare_batch(model, batch, needs_labels=loss_fn is None)
    with preserve_state(model, layers):
        GatePath(model, layers, inputs, loss_fn=loss_fn, max_rows=None, share=None).try_out()


def first_order_losses(path: GatePath, terms: tuple[Term, ...], progress: Progress | None) -> VariantLosses:
    """First-order estimates of the losses of all variants of ``terms``, and L(M)."""
    points: dict[Term, float] = {"without": 1.0, **({"alone": 0.0} if "alone" in terms else {})}
    losses: dict[Term, float] = {}
    variants: dict[Term, dict[str, Tensor]] = {}
    for done, (term, t) in enumerate(points.items(), 1):
        found = path.at(t)
        losses[term] = found.loss
        sign = -1 if term == "without" else 1  # a rank is removed from M, or added to the base model
        variants[term] = {name: found.loss + sign * gradient for name, gradient in found.gradient.items()}  # (r,)
        if progress is not None:
            progress(done, len(points))
    return VariantLosses(losses["without"], losses.get("alone"), variants, 0)
