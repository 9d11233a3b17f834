"""Saliency: how much the loss changes, to first order, if one rank is scaled by a small amount.

With a gate per rank, y = W x + s · B (g ⊙ (A x)), the loss at g = 1 has

    ∂L/∂g_r = Σ_j A_rj ∂L/∂A_rj          score(r) = mean over batches of |∂L/∂g_r|

because a gate g_r has the same effect as a factor g_r on the row A_r. To first order, |∂L/∂g_r| is how much the loss
changes if the rank is removed. Near a minimum the gradient over the whole data is small for every rank, because the
gradients of samples cancel. Therefore the magnitude is taken per batch; smaller batches cancel less. The cost is one
forward and one backward pass per batch and does not depend on the number of ranks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lorank.errors import ValidationBatchError
from lorank.lora.layer import AdapterLayers
from lorank.scoring.loss import LossFn, loss_gradients, loss_with_graph, prepare_batch, require_finite, unwrap_model
from lorank.scoring.preserve_state import preserve_state


def saliency_scores(
    model: nn.Module,
    layers: AdapterLayers,
    batches: Iterable[Mapping[str, Any]],
    *,
    loss_fn: LossFn | None = None,
) -> dict[str, Tensor]:
    """Scores every rank by |∂L/∂g_r|, averaged over batches. A gate that a layer already has is part of the model.

    The model is scored in evaluation mode and restored afterwards; no ``.grad`` is written.

    Args:
        model: the model that the layers belong to.
        layers: its LoRA layers.
        batches: one or more batches, each with the arguments of the model's forward, including ``labels``.
        loss_fn: ``loss_fn(model, batch)`` → a scalar with a graph, in place of ``model(**batch).loss``.

    Returns:
        Per layer (r,) float64 on the CPU, ≥ 0, higher = keep.

    Raises:
        ValidationBatchError: there is no batch; or a batch has no labels, no loss, or a loss that is NaN or infinite.
    """
    model = unwrap_model(model)
    alive = {name: layer for name, layer in layers.items() if layer.rank}
    rows = [layer.A for layer in alive.values()]
    wanted = [A.requires_grad for A in rows]
    scores = {name: torch.zeros(layer.rank, dtype=torch.float64) for name, layer in layers.items()}
    count = 0
    with preserve_state(model, layers), torch.enable_grad():
        try:
            for A in rows:
                A.requires_grad_(True)
            for batch in batches:
                loss = loss_with_graph(model, prepare_batch(model, batch, needs_labels=loss_fn is None), loss_fn)
                require_finite(loss.detach(), "the model")
                gradients = loss_gradients(loss, rows)
                count += 1
                for (name, layer), A, gradient in zip(alive.items(), rows, gradients, strict=True):
                    if gradient is not None:  # None: the loss of this batch does not depend on this module
                        products = layer.axes[0].matrix(A.detach().double() * gradient.double())  # (r, d_in)
                        scores[name] += products.sum(1).abs().cpu()  # (r,)
        finally:
            for A, before in zip(rows, wanted, strict=True):
                A.requires_grad_(before)
    if not count:
        raise ValidationBatchError("there is no batch to take gradients on: give at least one")
    return {name: total / count for name, total in scores.items()}
