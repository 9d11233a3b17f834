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
from lorank.scoring.loss import IGNORED, field

Form = Literal["shifted", "unshifted", "pooled"]


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


def _logits(output: Any) -> Any:
    logits = field(output, "logits")
    return output[0] if logits is None and type(output) is tuple else logits


@dataclass(frozen=True)
class Head:
    """Computes the logits of labelled positions only, if the model allows it.

    Attributes:
        model: the model.
        module: the output embedding of the model, which then receives (1, copies · m, d). None: logits are computed for
            the whole sequence.
    """

    model: nn.Module
    module: nn.Module | None

    def losses(self, arguments: Mapping[str, Any], targets: Targets, copies: int) -> Tensor:
        """Runs one forward pass; returns the cross-entropy summed over the labels, (copies,) float64."""
        with self._selecting(targets, copies):
            logits = _logits(self.model(**arguments))
        if self.module is None:
            logits = targets.select(logits, copies)  # (copies, m, C)
        return targets.cross_entropy(logits.reshape(copies, targets.count, logits.shape[-1]))  # (1, copies · m, C) →

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


def output_embedding(base: nn.Module) -> nn.Module | None:
    """The module that maps hidden states to logits over a vocabulary, or None if the model has none."""
    get: Callable[[], Any] | None = getattr(base, "get_output_embeddings", None)
    try:
        module = get() if get is not None else None
    except (AttributeError, NotImplementedError):
        return None
    return module if isinstance(module, nn.Module) else None
