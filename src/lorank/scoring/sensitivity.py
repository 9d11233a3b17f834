"""Sensitivity and its uncertainty, smoothed over training steps: AdaLoRA's score of a rank (arXiv 2303.10512, 3.2).

For every weight w of A, B and the gate λ, with the gradients of each training step

    I(w) = |w · ∂L/∂w|        Ī ← β₁ Ī + (1 − β₁) I        Ū ← β₂ Ū + (1 − β₂) |I − Ī|        s(w) = Ī · Ū

Ū is measured against the Ī that this step has already updated. The triplet of rank i (row A_i, column B_i, λ_i) has

    S_i = s(λ_i) + mean_j s(A_ij) + mean_j s(B_ji)

The gate needs no gradient of its own. The loss depends on λ_i and A_i only through their product, so

    λ_i · ∂L/∂λ_i = Σ_j A_ij · ∂L/∂A_ij

This also holds without a gate (λ = 1). It keeps the three terms comparable if the loop clips the gradients of A and B.
The state is a flat dictionary of tensors. It has twice as many numbers as the adapter, in float32 at least. A step is a
few fused operations on lists of tensors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lorank.lora import AdapterLayers
from lorank.lora.rank_index import reindex_ranks
from lorank.scoring.context import Context, State, TrainingInfo
from lorank.scoring.scorer import Choose, Scorer, Scores

BETA = 0.85
"""β₁ and β₂ of the paper."""

_MEAN, _UNCERTAINTY = "sensitivity", "uncertainty"


@dataclass(frozen=True)
class SensitivityScorer(Scorer):
    """Scores every rank by S_i, from the gradients of training. The moving averages of a new rank start at 0.

    Args:
        beta1: β₁, the decay rate of the sensitivity's moving average. In (0, 1).
        beta2: β₂, the decay rate of the uncertainty's moving average. In (0, 1).
    """

    beta1: float = BETA
    beta2: float = BETA

    @property
    def sees_gradients(self) -> bool:
        return True

    def start(self, layers: AdapterLayers, run: TrainingInfo) -> State:
        """Ī = Ū = 0 for every weight of every layer, on the device of the weight."""
        state: State = {}
        for kind in (_MEAN, _UNCERTAINTY):
            for label, weight in _weights(layers).items():
                state[f"{kind}.{label}"] = torch.zeros_like(weight, dtype=_at_least_float32(weight.dtype))
            state[f"{kind}.gate"] = rank_products(layers).zero_()
        return state

    def before_step(self, context: Context, state: State) -> None:
        self.measure_(context.layers, state, rank_products(context.layers))

    @torch.no_grad()
    def measure_(self, layers: AdapterLayers, state: State, gate_products: Tensor) -> None:
        """Updates Ī and Ū with the current ``.grad`` and the weights before the optimiser step.

        Args:
            state: from :meth:`start`, changed in place.
            gate_products: λ · ∂L/∂λ, (R,), see :func:`rank_products`.
        """
        weights = _weights(layers)
        sensitivities = list(
            torch._foreach_mul(_upcast(list(weights.values())), _upcast([_gradient(w) for w in weights.values()]))
        )
        sensitivities.append(gate_products.clone())
        labels = [*weights, "gate"]
        _follow_(state, labels, sensitivities)
        means = [state[f"{_MEAN}.{label}"] for label in labels]
        uncertainties = [state[f"{_UNCERTAINTY}.{label}"] for label in labels]
        torch._foreach_abs_(sensitivities)  # I
        torch._foreach_lerp_(means, sensitivities, 1 - self.beta1)
        torch._foreach_sub_(sensitivities, means)
        torch._foreach_abs_(sensitivities)  # |I − Ī|
        torch._foreach_lerp_(uncertainties, sensitivities, 1 - self.beta2)

    def has_measured(self, state: State) -> bool:
        """Whether the state holds a measurement: at least one step was measured, and :meth:`end` was not called."""
        return f"{_MEAN}.gate" in state and bool(state[f"{_MEAN}.gate"].any())

    @torch.no_grad()
    def score(self, context: Context, state: State, choose: Choose | None = None) -> Scores:
        """Scores every rank by S_i: per layer (r,) float64 on the CPU, ≥ 0, higher = keep."""
        layers = context.layers
        smoothed = {label: state[f"{_MEAN}.{label}"] * state[f"{_UNCERTAINTY}.{label}"] for label in _weights(layers)}
        gates = (state[f"{_MEAN}.gate"] * state[f"{_UNCERTAINTY}.gate"]).double().cpu()  # (R,)
        vectors = [
            # (r, d_in), (d_out, r) → (r,)
            layer.axes[0].matrix(smoothed[f"A.{name}"].double()).mean(1)
            + layer.axes[1].matrix(smoothed[f"B.{name}"].double()).mean(0)
            for name, layer in layers.items()
        ]
        scores = gates + torch.cat([values.to(vectors[0].device) for values in vectors]).cpu()  # (R,)
        return Scores(dict(zip(layers, torch.split(scores, list(layers.ranks.values())), strict=True)))

    def after_resize(self, context: Context, state: State, origins: Tensor) -> None:
        """Kept ranks keep their Ī and Ū; those of new ranks start at 0. Does nothing after :meth:`end`."""
        if f"{_MEAN}.gate" not in state:
            return
        ranks = context.layers.ranks
        for kind in (_MEAN, _UNCERTAINTY):
            first = 0
            for (name, rank), moved in zip(ranks.items(), torch.split(origins, list(ranks.values())), strict=True):
                axes = context.layers[name].axes
                before = axes[0].rank(state[f"{kind}.A.{name}"])
                own = torch.where(moved < 0, moved, moved - first)  # (r,)
                if before != rank or not torch.equal(own, torch.arange(rank)):
                    for axis, key in zip(axes, (f"{kind}.A.{name}", f"{kind}.B.{name}"), strict=True):
                        state[key] = reindex_ranks(state[key], axis.expand_origins(own, before), axis.axis)
                first += before
            state[f"{kind}.gate"] = reindex_ranks(state[f"{kind}.gate"], origins)

    def end(self, context: Context, state: State) -> None:
        for key in [key for key in state if key.split(".")[0] in (_MEAN, _UNCERTAINTY)]:
            del state[key]


def _follow_(state: State, labels: Sequence[str], sensitivities: Sequence[Tensor]) -> None:
    """Moves Ī and Ū to the dtype and device of the weights, which a loop may change between two steps."""
    for label, now in zip(labels, sensitivities, strict=True):
        if state[f"{_MEAN}.{label}"].dtype != now.dtype or state[f"{_MEAN}.{label}"].device != now.device:
            for kind in (_MEAN, _UNCERTAINTY):
                state[f"{kind}.{label}"] = state[f"{kind}.{label}"].to(now)


@torch.no_grad()
def rank_products(layers: AdapterLayers) -> Tensor:
    """λ_i · ∂L/∂λ_i = Σ_j A_ij · ∂L/∂A_ij for every rank, from the current gradients.

    Returns:
        (R,), all layers in order, on the first layer's device; 0 where A has no gradient.
    """
    groups: dict[tuple[object, ...], list[str]] = {}  # one multiplication for all layers of the same width
    for name, layer in layers.items():
        groups.setdefault((layer.A_matrix.shape[1], layer.A.dtype, layer.A.device), []).append(name)
    products: dict[str, Tensor] = {}
    for names in groups.values():
        A = _upcast([layers[name].A_matrix for name in names])  # (r, d_in) each
        gradients = _upcast([layers[name].axes[0].matrix(_gradient(layers[name].A)) for name in names])
        sums = (torch.cat(A) * torch.cat(gradients)).sum(1)  # (Σ r, d_in) → (Σ r,)
        products.update(zip(names, torch.split(sums, [len(rows) for rows in A]), strict=True))
    first = next(iter(layers.values())).A
    return torch.cat([products[name].to(first.device) for name in layers])


def _weights(layers: AdapterLayers) -> Mapping[str, Tensor]:
    return {f"A.{name}": layer.A for name, layer in layers.items()} | {
        f"B.{name}": layer.B for name, layer in layers.items()
    }


def _gradient(weight: Tensor) -> Tensor:
    """The gradient of a weight; zero if the loss of this step does not depend on the weight."""
    return torch.zeros_like(weight) if weight.grad is None else weight.grad


def _upcast(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors in float32 at least: a product of two float16 numbers may be too small for float16."""
    return [tensor.detach().to(_at_least_float32(tensor.dtype)) for tensor in tensors]


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
