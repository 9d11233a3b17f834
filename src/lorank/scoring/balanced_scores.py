"""The worth of every rank of an adapter in its balanced basis, from a few batches, outside of any run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from lorank.lora import AdapterLayers
from lorank.scoring.balanced import Balanced, balance
from lorank.scoring.gramians import measure_gramians
from lorank.scoring.loss import LossFn


def balanced_scores(
    model: nn.Module,
    layers: AdapterLayers,
    batches: Iterable[Mapping[str, Any]],
    *,
    loss_fn: LossFn | None = None,
    progress: Any = None,
) -> dict[str, Balanced]:
    """σ² of every rank, and the bases to which it belongs (:mod:`lorank.scoring.balanced`).

    The model is not changed. One forward and one backward pass per batch, in evaluation mode.

    Args:
        model: the model that the layers belong to.
        layers: its LoRA layers.
        batches: see :func:`lorank.scoring.measure_gramians`.
        loss_fn: ``loss_fn(model, batch)`` → a scalar with a graph, in place of ``model(**batch).loss``.
        progress: called with (batches done, batches in all); or None.

    Raises:
        ValidationBatchError: there is no batch; or a batch has no labels, no loss, or a loss that is NaN or infinite.
    """
    pairs = measure_gramians(model, layers, batches, loss_fn=loss_fn, progress=progress)
    return {name: balance(layers[name], pair) for name, pair in pairs.items()}
