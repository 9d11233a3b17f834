"""The Gramians of every module, from a few batches: what balanced truncation (scoring/balanced.py) needs to know.

For one module let z = A x, and ẑ = s · Bᵀ ∂loss/∂y = ∂loss/∂z, over the tokens of the batches that the loss depends on.
The loss of a batch is the mean over its N labels.

    Z = mean over tokens of z zᵀ        D = mean over batches of N · Σ_tokens ẑ ẑᵀ        both (r, r)

N · Σ ẑ ẑᵀ is the second moment of the gradient of one label's own loss, because the loss of a batch divides by N.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lorank.errors import ValidationBatchError
from lorank.lora import AdapterLayer, AdapterLayers
from lorank.lora.gramians import Gramians
from lorank.scoring.loss import LossFn, loss_gradients, loss_with_graph, prepare_batch, require_finite, unwrap_model
from lorank.scoring.microbatch import labels_in_mean_loss
from lorank.scoring.preserve_state import preserve_state


@dataclass(frozen=True)
class GramianPair:
    """The Gramians of one module.

    Attributes:
        Z: (r, r) float64 on the CPU; (E, r, r) for a layer with E > 1 experts, whose tokens are counted apart.
        D: of the same shape.
    """

    Z: Tensor
    D: Tensor


def measure_gramians(
    model: nn.Module,
    layers: AdapterLayers,
    batches: Iterable[Mapping[str, Any]],
    *,
    loss_fn: LossFn | None = None,
    progress: Any = None,
) -> dict[str, GramianPair]:
    """The Gramians of the present adapter, in evaluation mode: one forward and one backward pass per batch.

    The model is restored afterwards; no ``.grad`` is written.

    Args:
        model: the model that the layers belong to.
        layers: its LoRA layers.
        batches: one or more batches, each with the arguments of the model's forward, including ``labels``. Batches of a
            few rows suffice.
        loss_fn: ``loss_fn(model, batch)`` → a scalar with a graph, in place of ``model(**batch).loss``. It should be a
            mean over labels.
        progress: called with (batches done, batches in all), if the number of batches is known; or None.

    Returns:
        Per layer its Gramians. A layer that the loss does not depend on has D = 0.

    Raises:
        ValidationBatchError: there is no batch; or a batch has no labels, no loss, or a loss that is NaN or infinite.
    """
    model = unwrap_model(model)
    parts = list(batches)
    if not parts:
        raise ValidationBatchError("there is no batch to measure Gramians on: give at least one")
    leaves = [part for layer in layers.values() for part in layer.stored]  # what the forward pass uses
    wanted = [leaf.requires_grad for leaf in leaves]
    zeros = {name: torch.zeros(sum_shape(layer), dtype=torch.float64) for name, layer in layers.items()}
    Z, D = dict(zeros), dict(zeros)
    tokens = {name: torch.zeros(values.shape[:-2], dtype=torch.float64) for name, values in zeros.items()}
    with preserve_state(model, layers), torch.enable_grad():
        gramians = Gramians(layers, in_training_mode=False)
        try:
            for leaf in leaves:
                leaf.requires_grad_(True)
            for done, batch in enumerate(parts):
                prepared = prepare_batch(model, batch, needs_labels=loss_fn is None)
                loss = loss_with_graph(model, prepared, loss_fn)
                require_finite(loss.detach(), "the model")
                loss_gradients(loss, leaves)
                for name, own in gramians.sums.items():
                    if own.Z is not None and own.D is not None and own.tokens is not None:
                        Z[name] = Z[name] + own.Z.double().cpu()
                        D[name] = D[name] + labels_in_mean_loss(prepared) * own.D.double().cpu()
                        tokens[name] = tokens[name] + own.tokens.double().cpu()
                gramians.clear()
                if progress is not None:
                    progress(done + 1, len(parts))
        finally:
            gramians.remove()
            for leaf, before in zip(leaves, wanted, strict=True):
                leaf.requires_grad_(before)
    return {
        name: GramianPair(Z[name] / tokens[name].clamp_min(1)[..., None, None], D[name] / len(parts)) for name in layers
    }


def sum_shape(layer: AdapterLayer) -> tuple[int, ...]:
    """The shape of a layer's Z and D: (r, r), or (E, r, r) if it has experts."""
    experts = (layer.layout.experts,) if layer.layout.experts > 1 else ()
    return (*experts, layer.rank, layer.rank)
