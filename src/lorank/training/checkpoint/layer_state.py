"""What a file of weights does not say about the form in which layers are trained: gates, and heads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch

from lorank.lora import AdapterLayers, HeadGroups, plan_for_rank, resize_

STATE_KEY = "lorank"
"""Under which a rank state travels, in an optimiser's first parameter group."""


def layers_state(layers: AdapterLayers) -> dict[str, Any]:
    """What a rank state says of the layers."""
    return {
        "shapes": {name: (layer.d_in, layer.d_out) for name, layer in layers.items()},
        "ranks": layers.ranks,
        "heads": heads_state(layers),
        "gated": gated_state(layers),
    }


def gated_state(layers: AdapterLayers) -> dict[str, Any]:
    """Learned gates, and B as it is beneath them: a file holds the two folded into one. Empty without gates."""
    gates = layers.gates
    if gates is None:
        return {}
    return {
        "gates": gates.values.clone(),
        # What is in a pool is in its optimiser's checkpoint as it is.
        "B": {name: layer.B.detach().clone() for name, layer in layers.items() if layer.pool is None},
    }


def load_gated_state(layers: AdapterLayers, saved: Mapping[str, Any]) -> None:
    """The inverse of :func:`gated_state`, for layers of the same ranks."""
    if not saved:
        layers.drop_gates()
        return
    layers.learn_gates(saved["gates"])
    with torch.no_grad():
        for name, B in saved["B"].items():
            layers[name].B.copy_(B)


def heads_state(layers: AdapterLayers) -> dict[str, dict[str, Any]]:
    """The layers in per-head form: what the heads own, and the rank of each."""
    return {
        name: {**asdict(layer.groups), "ranks": list(layer.head_ranks)}
        for name, layer in layers.items()
        if layer.groups is not None
    }


def saved_heads(state: Mapping[str, Any]) -> dict[str, tuple[HeadGroups, list[int]]]:
    """The layers in per-head form of a saved rank state, as :func:`lorank.lora.restore_layout_` takes them."""
    heads: Mapping[str, Mapping[str, Any]] = state.get("heads", {})
    return {name: (HeadGroups(h["kind"], h["count"], h["size"]), h["ranks"]) for name, h in heads.items()}


def take_ranks_(layers: AdapterLayers, ranks: Mapping[str, int]) -> None:
    """Gives plain layers these ranks; those in per-head form have theirs from :func:`lorank.lora.restore_layout_`."""
    plain = {name: layer for name, layer in layers.items() if layer.groups is None}
    resize_(layers, {name: plan_for_rank(layer.rank, ranks[name]) for name, layer in plain.items()})
