"""A snapshot of all layers, from which they are restored if a run cannot start.

Restoring removes everything that was set on PEFT's layers in between: variants, hooks of state dicts, and the guarded
``merge`` of quantised layers.
"""

from __future__ import annotations

from typing import Any

import torch

from lorank.lora.layer import AdapterLayer, AdapterLayers
from lorank.lora.resize import replace_data
from lorank.lora.variants.gated import update_plain_lora_hooks

_LAYER_FIELDS = ("r", "lora_alpha", "scaling", "lora_variant")


class LayersSnapshot:
    """Weights, ranks and forms of all layers, their optimiser state, and PEFT's fields about them.

    Args:
        layers: all LoRA layers of one adapter.
        optimizer: the optimiser that holds their parameters. Its tensors are referenced, not copied, because a resize
            makes new tensors.
    """

    def __init__(self, layers: AdapterLayers, optimizer: torch.optim.Optimizer) -> None:
        self._layers, self._optimizer = layers, optimizer
        self._gates = layers.gates
        self._config = layers.config  # a resize replaces this object, and does not change it
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
        self._fields = {name: _read_fields(layer) for name, layer in layers.items()}
        self._merges = {name: vars(layer.module).get("merge") for name, layer in layers.items()}

    @torch.no_grad()
    def restore_(self) -> None:
        """Restores everything in place."""
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
            update_plain_lora_hooks(module)
            if self._merges[name] is None:
                vars(module).pop("merge", None)
            if layer.is_convolution:
                layer.note_rank()
            elif not layer.is_embedding:
                lora_A, lora_B = module.lora_A[adapter], module.lora_B[adapter]
                lora_A.out_features, lora_A.in_features = layer.stored[0].shape
                lora_B.out_features, lora_B.in_features = layer.stored[1].shape
        layers.gates = self._gates
        layers.config = self._config


def _read_fields(layer: AdapterLayer) -> dict[str, Any]:
    """PEFT's entries for this layer and adapter; None for an entry that does not exist."""
    return {name: getattr(layer.module, name).get(layer.adapter) for name in _LAYER_FIELDS}
