"""The mean loss over all labels of several batches."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from lorank.lora import AdapterLayers
from lorank.scoring.loss import LossFn, detached_loss, prepare_batch, require_finite, unwrap_model
from lorank.scoring.microbatch import labels_in_mean_loss
from lorank.scoring.preserve_state import preserve_state


def mean_loss(
    model: nn.Module, layers: AdapterLayers, batches: Iterable[Mapping[str, Any]], *, loss_fn: LossFn | None = None
) -> float:
    """The mean loss, in evaluation mode: every label of every batch has the same weight.

    Args:
        model: the model that the layers belong to. It is not changed.
        layers: its LoRA layers.
        batches: one or more batches, each with the arguments of the model's forward, including ``labels``.
        loss_fn: ``loss_fn(model, batch)`` → a scalar, the mean over labels, in place of ``model(**batch).loss``.

    Raises:
        ValidationBatchError: a batch has no labels, no loss, or a loss that is NaN or infinite.
    """
    model, total, count = unwrap_model(model), 0.0, 0
    with preserve_state(model, layers):
        for batch in batches:
            prepared = prepare_batch(model, batch, needs_labels=loss_fn is None)
            labels = labels_in_mean_loss(prepared)
            total += labels * require_finite(detached_loss(model, prepared, loss_fn), "the model")
            count += labels
    return total / max(1, count)
