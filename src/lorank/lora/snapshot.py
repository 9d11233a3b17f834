"""Layers as they are now, to come back to where a run cannot begin."""

from __future__ import annotations

from typing import Any

import torch

from lorank.lora.layer import AdapterLayer, AdapterLayers
from lorank.lora.resize import replace_data

_CONFIG = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "target_modules")
_OF_MODULE = ("r", "lora_alpha", "scaling", "lora_variant")


class LayersSnapshot:
    """Weights, ranks and forms of all layers, their optimiser state, and PEFT's own fields that speak of them.

    Args:
        layers: all LoRA layers of one adapter.
        optimizer: the optimiser that holds their parameters. Its tensors are noted, not copied: a
            resize makes new ones.
    """

    def __init__(self, layers: AdapterLayers, optimizer: torch.optim.Optimizer) -> None:
        self._layers, self._optimizer = layers, optimizer
        self._gates = layers.gates
        self._config = {name: getattr(layers.config, name) for name in _CONFIG}
        self._weights = {
            name: [(weight.detach().clone(), weight.grad) for weight in (layer.A, layer.B)]
            for name, layer in layers.items()
        }
        self._states = {
            weight: (optimizer.state[weight], dict(optimizer.state[weight]))  # the dictionary itself, and what is in it
            for layer in layers.values()
            for weight in (layer.A, layer.B)
            if weight in optimizer.state
        }
        self._fields = {name: _fields(layer) for name, layer in layers.items()}

    @torch.no_grad()
    def restore_(self) -> None:
        """Brings everything back."""
        layers, state = self._layers, self._optimizer.state
        for name, layer in layers.items():
            for weight, (data, grad) in zip((layer.A, layer.B), self._weights[name], strict=True):
                replace_data(weight, data, grad)
                if weight in self._states:
                    own, entries = self._states[weight]
                    own.clear()
                    own.update(entries)
                    state[weight] = own
                else:
                    state.pop(weight, None)
            module, adapter = layer.module, layer.adapter
            for field, value in self._fields[name].items():
                table = getattr(module, field)
                if value is None:
                    table.pop(adapter, None)
                else:
                    table[adapter] = value
            if not layer.is_embedding:
                down, up = module.lora_A[adapter], module.lora_B[adapter]
                down.out_features, down.in_features = layer.stored[0].shape
                up.out_features, up.in_features = layer.stored[1].shape
        layers.gates = self._gates
        for name, value in self._config.items():
            setattr(layers.config, name, value)


def _fields(layer: AdapterLayer) -> dict[str, Any]:
    """PEFT's entries for this adapter, None where there is none."""
    return {name: getattr(layer.module, name).get(layer.adapter) for name in _OF_MODULE}
