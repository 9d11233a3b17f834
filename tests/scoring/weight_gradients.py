"""The gradient of frozen weights, as autograd forms it: the slow twin of lorank.scoring.weight_gradient."""

from __future__ import annotations

import torch
from transformers.pytorch_utils import Conv1D

from lorank.lora import AdapterLayers


def by_autograd(layers: AdapterLayers, batches) -> dict[str, torch.Tensor]:
    """G of every layer, (d_out, d_in) float64."""
    weights = [layer.module.get_base_layer().weight for layer in layers.values()]
    for weight in weights:
        weight.requires_grad_(True)
    loss = sum(layers.model.eval()(**batch).loss for batch in batches) / len(batches)
    gradients = torch.autograd.grad(loss, weights)
    for weight in weights:
        weight.requires_grad_(False)
    found = dict(zip(layers, gradients, strict=True))
    return {name: (G.T if is_turned(layers[name]) else G).double() for name, G in found.items()}


def is_turned(layer) -> bool:
    """Whether the base layer keeps its weight as (d_in, d_out)."""
    return layer.is_embedding or isinstance(layer.module.get_base_layer(), Conv1D)
