"""The labels of a batch, the logits that they belong to, and the cross-entropy of variants.

The form of the loss says which logits a label belongs to. It is not looked up by the model's class: it is the form that
reproduces the model's own loss. If no form does (regression, label smoothing, a router's auxiliary loss, …), the exact
engine is not used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lorank.scoring.ablation_variants import IncompatibleError
from lorank.scoring.loss import IGNORED, forward_arguments, logits_of
from lorank.scoring.microbatch import inputs_without_labels

Form = Literal["shifted", "unshifted", "pooled"]
COMPARED_POSITIONS = 64
"""The most labelled positions whose logits are compared between two forward passes. A vocabulary may be large."""


@dataclass(frozen=True)
class Targets:
    """The labelled positions of a batch of n samples with T tokens each.

    Attributes:
        form: ``shifted``: the logits at t belong to the label at t + 1 (causal language models); ``unshifted``: to the
            label at t (masked language models, token classification); ``pooled``: one label per sample.
        labels: (m,), the labels that are not ignored.
        positions: (m,), the position of each label: an index into the n · T positions, or into the n samples.
    """

    form: Form
    labels: Tensor
    positions: Tensor

    @property
    def count(self) -> int:
        """m, the number of labels that the loss is the mean over."""
        return len(self.labels)

    @classmethod
    def of(cls, form: Form, labels: Tensor) -> Targets:
        """The targets of ``labels``, (n, T), or (n,) or (n, 1) for the form ``pooled``."""
        if form == "shifted":
            labels = F.pad(labels[:, 1:], (0, 1), value=IGNORED)  # (n, T)
        flat = labels.reshape(-1)  # (n · T,) or (n,)
        positions = (flat != IGNORED).nonzero().squeeze(1)  # (m,)
        return cls(form, flat[positions], positions)

    def spread(self, most: int) -> Targets:
        """At most ``most`` of the labels, evenly spread."""
        chosen = torch.linspace(0, self.count - 1, min(most, self.count)).long().to(self.positions.device)  # (most,)
        return Targets(self.form, self.labels[chosen], self.positions[chosen])

    def select(self, x: Tensor, copies: int) -> Tensor:
        """The labelled positions of ``copies`` variants of the batch, stacked.

        Args:
            x: (copies · n, T, d), or (copies · n, d) for the form ``pooled``.

        Returns:
            (copies, m, d)
        """
        return x.reshape(copies, -1, x.shape[-1])[:, self.positions]  # (copies, n · T, d) → (copies, m, d)

    def cross_entropy(self, logits: Tensor) -> Tensor:
        """The cross-entropy, summed over the labels: each term in float32 or float64, the sum in float64.

        Args:
            logits: (copies, m, C)

        Returns:
            (copies,) float64
        """
        if logits.dtype in (torch.float16, torch.bfloat16):
            logits = logits.float()
        labels = self.labels.to(logits.device)
        # One variant at a time, to save memory: cross-entropy allocates a second array as large as its logits.
        return torch.stack([F.cross_entropy(each, labels, reduction="none").double().sum() for each in logits])


def find_form(logits: Any, labels: Any, loss: Tensor) -> Form:
    """The form in which cross-entropy gives the model's own loss.

    Args:
        logits: the model's logits, (n, T, C) or (n, C).
        labels: (n, T), (n,) or (n, 1).
        loss: the model's own loss, ().

    Raises:
        IncompatibleError: no form gives the model's own loss.
    """
    if not isinstance(logits, Tensor) or not isinstance(labels, Tensor):
        raise IncompatibleError("its forward gives no logits, or its batch has no labels")
    forms: list[Form] = []
    if not labels.is_floating_point() and labels.dtype != torch.bool:
        if logits.dim() == 3 and labels.shape == logits.shape[:2]:
            forms = ["shifted", "unshifted"]
        elif logits.dim() == 2 and labels.numel() == labels.shape[0] == logits.shape[0]:
            forms = ["pooled"]
    difference: dict[Form, float] = {}
    for form in forms:
        targets = Targets.of(form, labels)
        if targets.count and int(targets.labels.max()) < logits.shape[-1] and int(targets.labels.min()) >= 0:
            mean = targets.cross_entropy(targets.select(logits, 1)) / targets.count  # (1,)
            difference[form] = abs(float(mean) - float(loss))
    # The loss is rounded to its dtype, by a few ulps. In float64 the model may still compute it in float32, hence 1e-5.
    tolerance = (1e-5 + 4 * torch.finfo(loss.dtype).eps) * abs(float(loss)) + 1e-7
    best = min(difference, key=lambda form: difference[form], default=None)
    if best is None or difference[best] > tolerance:
        raise IncompatibleError("its loss is not the mean cross-entropy of its logits and labels")
    return best


@dataclass(frozen=True)
class Head:
    """Computes the logits of labelled positions by a forward pass of the model.

    Attributes:
        model: the model.
        module: the output embedding of the model, which then receives (1, copies · m, d): only labelled positions get
            logits. None: logits are computed for the whole sequence.
        with_labels: whether the forward pass receives the labels. Then the model also computes its own loss, which is
            not used.
    """

    model: nn.Module
    module: nn.Module | None
    with_labels: bool = False

    def arguments(self, part: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments of the forward pass, from a part of the batch."""
        inputs = part if self.with_labels else inputs_without_labels(self.model, part)
        return {**forward_arguments(self.model), **inputs}

    def losses(self, arguments: Mapping[str, Any], targets: Targets, copies: int) -> Tensor:
        """Runs one forward pass; returns the cross-entropy summed over the labels, (copies,) float64."""
        return targets.cross_entropy(self.logits(arguments, targets, copies))

    def logits(self, arguments: Mapping[str, Any], targets: Targets, copies: int) -> Tensor:
        """Runs one forward pass; returns the logits of the labelled positions, (copies, m, C)."""
        with self._selecting(targets, copies):
            logits: Tensor = logits_of(self.model(**arguments))
        if self.module is None:
            return targets.select(logits, copies)  # (copies, m, C)
        return logits.reshape(copies, targets.count, logits.shape[-1])  # (1, copies · m, C) → (copies, m, C)

    @contextmanager
    def _selecting(self, targets: Targets, copies: int) -> Iterator[None]:
        def select(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            x = targets.select(args[0], copies)  # (copies · n, T, d) → (copies, m, d)
            return (x.reshape(1, -1, x.shape[-1]), *args[1:])  # (1, copies · m, d)

        if self.module is None:
            yield
            return
        handle = self.module.register_forward_pre_hook(select)
        try:
            yield
        finally:
            handle.remove()


def find_head(
    model: nn.Module, part: Mapping[str, Any], targets: Targets, logits: Tensor, embedding: nn.Module | None
) -> Head:
    """The cheapest forward pass that gives the logits of a forward pass with labels.

    A pass without labels is cheaper, because the output embedding can then be applied to labelled positions only. But
    some models cannot run without labels, and some compute other logits: an encoder–decoder model makes the inputs of
    its decoder from the labels. So each pass is tried, and its logits are compared.

    Args:
        part: samples with labels.
        targets: the labels of ``part``.
        logits: the model's logits of ``part`` with labels, (n, T, C) or (n, C).
        embedding: the output embedding, if it can be applied to labelled positions only; else None.

    Raises:
        IncompatibleError: no pass gives these logits, so the model gives other logits in each pass.
    """
    heads = [Head(model, None), Head(model, None, with_labels=True)]
    if embedding is not None:
        heads.insert(0, Head(model, embedding))
    some = targets.spread(COMPARED_POSITIONS)
    expected = some.select(logits, 1)  # (1, m, C)
    tolerance = _rounding(model, logits)
    for head in heads:
        try:
            if _agree(head.logits(head.arguments(part), some, 1), expected, tolerance):
                return head
        except torch.OutOfMemoryError:
            raise
        except Exception:  # the model may raise anything when it is called in another way
            continue
    raise IncompatibleError("its logits differ between two forward passes with the same batch")


def _agree(found: Tensor, expected: Tensor, tolerance: float) -> bool:
    """Whether two tensors of logits are the same up to rounding. ``tolerance`` is relative to the largest logit."""
    if found.shape != expected.shape:
        return False
    difference = torch.where(found == expected, 0.0, (found - expected).abs())  # a logit may be −inf in both
    largest = expected[expected.isfinite()].abs().amax() if expected.isfinite().any() else 0.0
    return bool((difference <= tolerance * largest).all())


def _rounding(model: nn.Module, logits: Tensor) -> float:
    """How far the logits of two forward passes may differ by rounding, relative to the largest logit.

    Other inputs of a decoder change logits by about as much as their own size.
    """
    dtypes = {logits.dtype, *(parameter.dtype for parameter in model.parameters())}
    device = logits.device.type
    exact = dtypes <= {torch.float32, torch.float64} and not torch.is_autocast_enabled(device)
    if device == "cuda" and torch.get_float32_matmul_precision() != "highest":
        exact = False
    return 1e-3 if exact else 5e-2


def output_embedding(base: nn.Module) -> nn.Module | None:
    """The module that maps hidden states to logits over a vocabulary, or None if the model has none."""
    get: Callable[[], Any] | None = getattr(base, "get_output_embeddings", None)
    try:
        module = get() if get is not None else None
    except Exception:  # a model of the user's may raise anything here
        return None
    return module if isinstance(module, nn.Module) else None
