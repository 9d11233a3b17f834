"""Weights of a model in which some modules are not adapted, for a live model in which they are.

A module of rank 0 is not in an adapter's file. A model that is loaded from such a file has a plain layer in its place,
and its complete state dict names the layer's weights without PEFT's wrapper:

    layers.0.q_proj.weight        →        layers.0.q_proj.base_layer.weight

So these keys state that the module has rank 0. Sentence-Transformers loads checkpoints in this way.
"""

from __future__ import annotations

from collections.abc import MutableMapping

from torch import Tensor

from lorank.lora.layer import AdapterLayers


def wrap_unadapted_keys_(layers: AdapterLayers, state_dict: MutableMapping[str, Tensor], prefix: str) -> set[str]:
    """Renames the keys of modules that are not adapted in the loaded weights, so that the live model takes them.

    Args:
        layers: all LoRA layers of one adapter of the live model.
        state_dict: the weights, changed in place.
        prefix: the prefix of ``layers.model`` in the keys.

    Returns:
        The names of these modules. They have rank 0 in the loaded weights.
    """
    unadapted = set()
    for name, layer in layers.items():
        if layer.is_expert:  # it is in every file, also at rank 0
            continue
        outer = f"{prefix}{layers.prefix}{name}."
        for key, _ in layer.module.get_base_layer().named_parameters(recurse=False):
            if f"{outer}{key}" in state_dict and f"{outer}base_layer.{key}" not in state_dict:
                state_dict[f"{outer}base_layer.{key}"] = state_dict.pop(f"{outer}{key}")
                unadapted.add(name)
    return unadapted
