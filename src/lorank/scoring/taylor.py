"""First-order (Taylor) estimates of ablation: two backward passes score every rank.

A mask m multiplies the gates that the model has, y = W x + s · B (m ⊙ g ⊙ (A x)), and L is the mean cross-entropy over
the labels of one batch: the loss that ablation compares. At m = t · 1, on the path from the base model (t = 0) to the
model itself (t = 1), one forward and one backward pass give L and ∂L/∂m_r for every rank, however many there are. Then

    L(M without r)  ≈  L(M)    − ∂L/∂m_r at m = 1
    L(r alone)      ≈  L(base) + ∂L/∂m_r at m = 0

and the scores follow from these losses as they do from exact ones (:mod:`lorank.scoring.ablation`). The cost does not
depend on the number of ranks, so a batch of hundreds of samples is affordable: what an estimate loses in exactness it
may win back by less noise.

A large batch runs in parts, each part's loss weighted by its labels, so that the sum is the gradient of the batch's own
loss; sums are in float64.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lorank.lora.layer import AdapterLayers
from lorank.scoring.ablation import AblationResult, check_terms, scores_of
from lorank.scoring.loss import (
    LossFn,
    base_of,
    field,
    forward_arguments,
    loss_with_graph,
    prepare_batch,
    require_finite,
    unwrap_model,
)
from lorank.scoring.microbatch import (
    TOKENS_PER_PASS,
    in_passes,
    inputs_of,
    is_by_sample,
    is_larger_than_a_pass,
    labelled,
    repeated,
    rows_of,
)
from lorank.scoring.preserve_state import preserve_state
from lorank.scoring.targets import Form, Head, Targets, find_form, output_embedding
from lorank.scoring.variants import TERMS, Gates, Progress, Term, Terms, Unsuited, VariantLosses, in_order
from lorank.scoring.work_sharding import Share, deal_out, exchange

logger = logging.getLogger("lorank")

SAMPLES_WATCHED = 4


@dataclass(frozen=True)
class Gradient:
    """At one point of the path.

    Attributes:
        loss: L there.
        gradient: ∂L/∂m_r per layer, (r,) float64 on the CPU.
    """

    loss: float
    gradient: dict[str, Tensor]


class GatePath:
    """Gradients of the gates. Used inside :func:`~lorank.scoring.preserve_state.preserve_state`.

    Args:
        batch: on the model's device.
        loss_fn: in place of the model's loss; the batch then runs whole.
        max_rows: samples in one pass; None: up to ``TOKENS_PER_PASS`` tokens.
        share: this process's share: every process takes some of the samples. None: all of them.

    Attributes:
        notice: why the batch runs whole, where it does although it is larger than one pass should be; else None.
        passes: how many backward passes over the batch were made.
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
                raise Unsuited("loss_fn may weigh its samples in any way")
            self._form, self._head = _watch(model, batch)
            self._parts = _parts(batch, max_rows, share)
            self._count = Targets.of(self._form, batch["labels"]).count
        except Unsuited as reason:
            self._form = None
            if is_larger_than_a_pass(batch, max_rows):
                self.notice = f"all samples share one pass over the gradients: they cannot be split, because {reason}"
                logger.warning(self.notice)

    def at(self, t: float) -> Gradient:
        """The gradient where all masks are ``t``.

        Raises:
            ValidationBatchError: the loss there is not finite.
        """
        names = [name for name, _ in in_order(self.layers)]
        own = [self.gates.ones(name) for name in names]  # (r,) each
        # In float32 at least: a gradient that is summed in 16 bits would lose what later sums keep.
        leaves = [(t * g).to(torch.promote_types(g.dtype, torch.float32)).requires_grad_() for g in own]
        sums = [torch.zeros(len(g), dtype=torch.float64) for g in own]
        total = 0.0

        def row() -> list[float]:
            nonlocal total
            with torch.enable_grad():
                for part in self._parts:
                    loss = self._loss(part)
                    total += float(loss.detach())
                    if not math.isfinite(total):
                        break  # said below, by all processes alike
                    gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
                    for index, gradient in enumerate(gradients):
                        if gradient is not None:  # else the batch does not reach this layer
                            sums[index] += gradient.double().cpu()
            return [total, *torch.cat([g.double().cpu() * s for g, s in zip(own, sums, strict=True)]).tolist()]

        for name, leaf in zip(names, leaves, strict=True):
            self.layers[name].gate = leaf
        try:
            length = 1 + self.layers.total_rank
            rows = exchange(row, length, self.share)  # (processes, 1 + R)
        finally:
            for name in names:
                self.layers[name].gate = self.gates.own[name]
        self.passes += 1
        # Where samples cannot be dealt, every process has taken all of them.
        found = rows.sum(0) / self._count if self._form is not None else rows[0]  # (1 + R,)
        loss = require_finite(float(found[0]), "the model" if t == 1 else f"the model with all gates at {t:g}")
        values = dict(zip(names, torch.split(found[1:], [len(g) for g in own]), strict=True))
        empty = torch.zeros(0, dtype=torch.float64)
        return Gradient(loss, {name: values.get(name, empty) for name in self.layers})

    def _loss(self, part: Mapping[str, Any]) -> Tensor:
        """With the form known summed over the labels, else the model's own mean."""
        if self._form is None or self._head is None:
            return loss_with_graph(self.model, part, self.loss_fn)
        targets = Targets.of(self._form, part["labels"])
        arguments = {**forward_arguments(self.model), **inputs_of(self.model, part)}
        return self._head.losses(arguments, targets, 1)[0]


def _watch(model: nn.Module, batch: Mapping[str, Any]) -> tuple[Form, Head]:
    """The form of the model's loss, and where its logits are made: shown by one forward of a few samples.

    Raises:
        Unsuited: the loss is not the mean cross-entropy of logits, or computing fewer logits changes it.
    """
    rows = rows_of(batch)
    part = batch
    if is_by_sample(batch, rows):
        with_labels = [row for row in range(rows) if labelled({"labels": batch["labels"][row : row + 1]})]
        chosen = torch.tensor(with_labels[:SAMPLES_WATCHED])
        part = {key: value[chosen.to(value.device)] for key, value in batch.items()}
        part = repeated(part, 2) if len(chosen) == 1 else part  # else the head's input could look like any other
    embedding = output_embedding(base_of(model))
    shapes: list[torch.Size] = []
    handle = None
    if embedding is not None:
        handle = embedding.register_forward_pre_hook(lambda _, args: shapes.append(args[0].shape), prepend=True)
    try:
        output = model(**forward_arguments(model), **part)
    finally:
        if handle is not None:
            handle.remove()
    loss, logits = field(output, "loss"), field(output, "logits")
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise Unsuited("its forward gives no loss under that name")
    require_finite(loss, "the model")
    form = find_form(logits, part["labels"], loss)
    selecting = form != "pooled" and len(shapes) == 1 and shapes[0][:-1] == part["labels"].shape
    head = Head(model, embedding if selecting else None)
    if selecting:
        targets = Targets.of(form, part["labels"])
        fewer = float(head.losses({**forward_arguments(model), **inputs_of(model, part)}, targets, 1)) / targets.count
        if not abs(fewer - float(loss)) <= 5e-3 * abs(float(loss)):
            head = Head(model, None)
    return form, head


def _parts(batch: Mapping[str, Any], max_rows: int | None, share: Share | None) -> list[Mapping[str, Any]]:
    """This process's samples in parts that one pass takes.

    Raises:
        Unsuited: they cannot be split.
    """
    rows = rows_of(batch)
    if not is_by_sample(batch, rows):
        if share is None and not is_larger_than_a_pass(batch, max_rows):
            return [batch]
        raise Unsuited("some tensor of the batch does not have one row per sample")
    own = torch.tensor(deal_out(range(rows), share), dtype=torch.long)
    return [*in_passes(batch, own, TOKENS_PER_PASS, max_rows)]


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

    The model is scored as it is used: in evaluation mode, under the autocast that is on. Everything is restored.

    Args:
        model, layers, batch, terms: as in :func:`~lorank.scoring.ablation_scores`.
        loss_fn: ``loss_fn(model, batch)`` → a scalar with a graph, in place of ``model(**batch).loss``; the batch then
            runs in one pass.
        max_rows: at most so many samples in one pass. Default: up to 2,048 tokens.
        progress: called with (passes over the batch done, in all).
        share: this process's share of the samples; None: all.

    Raises:
        ValidationBatchError: the batch cannot be scored on, or a loss is not finite.
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
    )


def first_order_losses(path: GatePath, terms: tuple[Term, ...], progress: Progress | None) -> VariantLosses:
    """The losses of all variants of these terms, to first order; L(M) in any case."""
    points: dict[Term, float] = {"without": 1.0, **({"alone": 0.0} if "alone" in terms else {})}
    losses: dict[Term, float] = {}
    variants: dict[Term, dict[str, Tensor]] = {}
    for done, (term, t) in enumerate(points.items(), 1):
        found = path.at(t)
        losses[term] = found.loss
        sign = -1 if term == "without" else 1  # a rank is taken away, or added
        variants[term] = {name: found.loss + sign * gradient for name, gradient in found.gradient.items()}  # (r,)
        if progress is not None:
            progress(done, len(points))
    return VariantLosses(losses["without"], losses.get("alone"), variants, 0)
