"""Derivatives of the loss with respect to gates, at any gate values; the diagonal of its Hessian by random signs."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lorank.lora import AdapterLayers
from lorank.scoring.loss import IGNORED
from lorank.scoring.microbatch import TOKENS_PER_PASS, split_into_passes
from lorank.scoring.preserve_state import preserve_state

EPSILON = 0.1
"""Half the distance of a central difference of gradients; a gate ranges from 0 to 1."""


def gradient(model: nn.Module, layers: AdapterLayers, batch: Mapping[str, Tensor], gates: Tensor) -> Tensor:
    """∂L/∂g at ``gates``, both (R,) over all layers in order; float64."""
    sizes = [layer.rank for layer in layers.values()]
    leaf = gates.float().requires_grad_()
    sums = torch.zeros(len(gates), dtype=torch.float64)
    total = label_count(batch)
    with preserve_state(model, layers), torch.enable_grad():
        for layer, gate in zip(layers.values(), torch.split(leaf, sizes), strict=True):
            layer.gate = gate
        for part in split_into_passes(batch, torch.arange(len(batch["labels"])), TOKENS_PER_PASS, None):
            loss = model(**part).loss * (label_count(part) / total)
            (found,) = torch.autograd.grad(loss, leaf)
            sums += found.double().cpu()
    return sums


def hessian_diagonal(
    model: nn.Module, layers: AdapterLayers, batch: Mapping[str, Tensor], t: float, draws: int, seed: int = 0
) -> Tensor:
    """The diagonal of ∂²L/∂g² with all gates at ``t``, (R,): Hutchinson's estimate, the mean of z ⊙ H z over random
    signs z.

    H z is a central difference of two gradients, so this takes 2 · ``draws`` forward and backward passes.
    """
    generator = torch.Generator().manual_seed(seed)
    point = torch.full((layers.total_rank,), t, dtype=torch.float64)
    total = torch.zeros_like(point)
    for _ in range(draws):
        signs = torch.randint(0, 2, point.shape, generator=generator).double() * 2 - 1
        ahead, behind = (gradient(model, layers, batch, point + side * EPSILON * signs) for side in (1, -1))
        total += signs * (ahead - behind) / (2 * EPSILON)
    return total / draws


def label_count(batch: Mapping[str, Tensor]) -> int:
    """The number of labels in the mean loss; the first label of a sequence is never predicted."""
    labels = batch["labels"]
    return int((labels[:, 1:] if labels.dim() == 2 else labels).ne(IGNORED).sum())
