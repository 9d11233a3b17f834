"""Finding the LoRA layers of one adapter in a model, through objects, and refusing those whose ranks cannot move."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peft import LoraConfig
from peft.tuners.lora.layer import LoraLayer
from torch import nn

from lorank.errors import AdapterError
from lorank.lora.layer import AdapterLayer, AdapterLayers
from lorank.lora.quantised import check_base
from lorank.lora.variants.dora import is_dora
from lorank.lora.variants.fused import FusedLora
from lorank.lora.variants.gated import GatedLora
from lorank.lora.variants.per_head import HeadLora


def find_layers(model: nn.Module, adapter: str | None = None) -> AdapterLayers:
    """All LoRA layers of one adapter of ``model``.

    Args:
        model: a ``PeftModel``, or a transformers model with an adapter added by ``add_adapter``.
        adapter: the adapter's name; default: the one that is active.

    Raises:
        AdapterError: no LoRA layer there, no such adapter, several adapters active, an adapter that is merged, a
            layer whose forward ignores gates or whose base passes no gradient on, another variant with a forward, or
            weights tied between two LoRA layers.
    """
    configs: Mapping[str, Any] | None = getattr(model, "peft_config", None)
    found = [(name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer)]
    if not found or not configs:
        raise AdapterError(
            f"no LoRA layer found in {type(model).__name__}. Give the model an adapter first: "
            "model = get_peft_model(model, LoraConfig(r=8, target_modules='all-linear'))"
        )
    adapter = _adapter_name(model, configs, adapter)
    layers: dict[str, AdapterLayer] = {}
    owners: dict[int, str] = {}
    # PEFT matches patterns against names inside the model that it wrapped.
    inner = _wrapped_model(model)
    inner_name = next(name for name, module in model.named_modules() if module is inner)
    prefix = f"{inner_name}." if inner_name else ""
    for full_name, module in found:
        if adapter not in module.lora_A and adapter not in module.lora_embedding_A:
            continue
        name = full_name.removeprefix(prefix)
        _check_layer(name, module, adapter)
        layer = AdapterLayer(name, module, adapter)
        for parameter in (layer.A, layer.B):
            if id(parameter) in owners:
                raise AdapterError(
                    f"{name} and {owners[id(parameter)]} share a LoRA weight, so their ranks cannot differ. "
                    "Adapt only one of them, or make the adapter without ensure_weight_tying"
                )
            owners[id(parameter)] = name
        layers[name] = layer
    return AdapterLayers(model, adapter, configs[adapter], layers, prefix)


def _wrapped_model(model: nn.Module) -> nn.Module:
    """The model inside a PeftModel (names in patterns start there), or the model itself."""
    tuner = getattr(model, "base_model", None)
    inner = getattr(tuner, "model", None)
    return inner if isinstance(inner, nn.Module) and hasattr(tuner, "targeted_module_names") else model


def _adapter_name(model: nn.Module, configs: Mapping[str, Any], adapter: str | None) -> str:
    if adapter is None:
        names = _active_adapters(model) or list(configs)
        if len(names) != 1:
            raise AdapterError(f"{len(names)} adapters are active ({', '.join(names)}): name one with adapter=…")
        adapter = names[0]
    if adapter not in configs:
        raise AdapterError(f"there is no adapter {adapter!r}; the model has: {', '.join(configs)}")
    if not isinstance(configs[adapter], LoraConfig):
        raise AdapterError(
            f"adapter {adapter!r} is a {type(configs[adapter]).__name__}, not a LoraConfig: only LoRA has ranks to move"
        )
    return adapter


def _active_adapters(model: nn.Module) -> list[str]:
    active = getattr(model, "active_adapters", None)  # a property of PeftModel, a method of PreTrainedModel
    try:
        return list(active() if callable(active) else active or ())
    except ValueError:  # PreTrainedModel raises where a PeftModel around it did the loading
        return []


def _check_layer(name: str, module: LoraLayer, adapter: str) -> None:
    check_base(name, module)
    if module.merged:
        raise AdapterError(f"{name}: adapter {adapter!r} is merged into the base weights. Call model.unmerge_adapter()")
    variant = module.lora_variant.get(adapter)
    if variant is not None and not isinstance(variant, GatedLora | HeadLora | FusedLora) and not is_dora(variant):
        raise AdapterError(
            f"{name}: the adapter uses {type(variant).__name__}, which has a forward of its own. "
            "Make the adapter as plain LoRA or with use_dora=True"
        )
    if getattr(module, "tp_layer", None) is not None:
        raise AdapterError(f"{name}: LoRA weights sharded by tensor parallelism cannot be resized")
