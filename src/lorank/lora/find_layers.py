"""Finds the LoRA layers of one adapter by their classes, and refuses layers whose ranks cannot be changed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from peft import LoraConfig
from peft.tuners.lora.layer import LoraLayer
from torch import nn

from lorank.errors import AdapterError
from lorank.lora.experts import in_order, is_expert, parameter_name
from lorank.lora.layer import AdapterLayer, AdapterLayers
from lorank.lora.quantised import check_base
from lorank.lora.rank_layout import layout_of
from lorank.lora.shared_memory import MemoryRange, memory_range, overlap
from lorank.lora.supported_kinds import check_kinds
from lorank.lora.variants.convolution import EmptyConvolution, is_convolution
from lorank.lora.variants.dora import is_dora
from lorank.lora.variants.fused import FusedLora
from lorank.lora.variants.gated import GatedLora
from lorank.lora.variants.per_head import HeadLora


def find_layers(model: nn.Module, adapter: str | None = None) -> AdapterLayers:
    """Finds all LoRA layers of one adapter of ``model``.

    Args:
        model: a ``PeftModel``, a transformers model with an adapter added by ``add_adapter``, or a larger model that
            contains one of them: an encoder with a head, a Sentence Transformer.
        adapter: the adapter's name; None: the active adapter.

    Returns:
        The layers. Their ``model`` is the ``PeftModel`` or the transformers model, and their names are relative to what
        PEFT has wrapped, as in PEFT's patterns.

    Raises:
        AdapterError: the model has no LoRA layer or no such adapter, it contains several adapted models, several
            adapters are active, the adapter is merged, a layer's forward ignores gates, a base layer blocks the
            gradient of its input, a layer uses an unsupported variant, or two LoRA layers share a weight.
    """
    model = _adapted_model(model)
    configs: Mapping[str, Any] = model.peft_config  # type: ignore[assignment]  # PEFT's attribute
    found = list(in_order([(name, m) for name, m in model.named_modules() if isinstance(m, LoraLayer)]))
    adapter = _adapter_name(model, configs, adapter)
    layers: dict[str, AdapterLayer] = {}
    # PEFT's patterns are matched against names relative to the wrapped model, so layers are named in this way too.
    inner = wrapped_model(model)
    inner_name = next(name for name, module in model.named_modules() if module is inner)
    prefix = f"{inner_name}." if inner_name else ""
    adapted = {
        name.removeprefix(prefix): module
        for name, module in found
        if adapter in module.lora_A or adapter in module.lora_embedding_A
    }
    check_kinds(inner, adapted, configs[adapter])
    for full_name, module in found:
        if adapter not in module.lora_A and adapter not in module.lora_embedding_A:
            continue
        path = full_name.removeprefix(prefix)
        name = parameter_name(path, module) if is_expert(module) else path
        _check_supported(name, module, adapter)
        layers[name] = AdapterLayer(name, module, adapter, configs[adapter].bias, path)
    _check_no_shared_weights(layers)
    if getattr(configs[adapter], "ensure_weight_tying", False):
        _check_no_tied_bases(layers)
    return AdapterLayers(model, adapter, configs[adapter], layers, prefix)


def _adapted_model(model: nn.Module) -> nn.Module:
    """The model with PEFT's configurations: ``model`` itself, or the only one inside it.

    Raises:
        AdapterError: there is none with LoRA layers, or there are several.
    """
    found = list(_adapted_models(model))
    if not found:
        raise AdapterError(
            f"no LoRA layer found in {type(model).__name__}. Add an adapter to the model first: "
            "model = get_peft_model(model, LoraConfig(r=8, target_modules='all-linear'))"
        )
    if len(found) > 1:
        names = ", ".join(f"{name} ({type(inner).__name__})" for name, inner in found)
        first = found[0][0]
        raise AdapterError(
            f"{type(model).__name__} contains {len(found)} models with LoRA layers: {names}. A run allocates the ranks "
            f"of one of them: choose it with attach(model.{first}, …) and, if the loss needs the whole model, your own "
            f"loss_fn; with the Trainer by RankCallback(…, model=model.{first})"
        )
    return found[0][1]


def _adapted_models(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The outermost modules with PEFT's configurations and LoRA layers, by name."""
    seen: set[int] = set()
    waiting = [("", model)]
    while waiting:
        name, module = waiting.pop(0)
        if id(module) in seen:
            continue
        seen.add(id(module))
        if getattr(module, "peft_config", None):
            if any(isinstance(inner, LoraLayer) for inner in module.modules()):
                yield name, module
            continue
        waiting = [(f"{name}.{key}".lstrip("."), child) for key, child in module.named_children()] + waiting


def _check_no_shared_weights(layers: Mapping[str, AdapterLayer]) -> None:
    """Raises AdapterError if two layers share a Parameter, or memory as different Parameters (``ensure_weight_tying``).

    A change of rank would separate them.
    """
    parameter_owner: dict[int, str] = {}
    ranges: list[tuple[MemoryRange, str]] = []
    for name, layer in layers.items():
        for parameter in layer.stored:
            other = parameter_owner.setdefault(id(parameter), name)
            if other != name:
                raise _shared_weight_error(other, name)
            if (found := memory_range(parameter)) is not None:
                ranges.append((found, name))
    ranges.sort()
    furthest: tuple[MemoryRange, str] | None = None
    for found, name in ranges:
        if furthest is not None and furthest[1] != name and overlap(furthest[0], found):
            raise _shared_weight_error(*sorted((name, furthest[1]), key=list(layers).index))
        if furthest is None or found[0] != furthest[0][0] or found[2] > furthest[0][2]:
            furthest = found, name


def _check_no_tied_bases(layers: Mapping[str, AdapterLayer]) -> None:
    """Raises AdapterError if two layers adapt one weight, which PEFT ties again when it loads a file.

    Some initialisations (orthogonal, EVA) separate the LoRA weights that ``ensure_weight_tying`` has tied. A file would
    then give other outputs than the live model.
    """
    owners: dict[MemoryRange, str] = {}
    for name, layer in layers.items():
        weight = getattr(layer.module.get_base_layer(), "weight", None)
        if weight is not None and (found := memory_range(weight)) is not None:
            other = owners.setdefault(found, name)
            if other != name:
                raise _shared_weight_error(other, name)


def _shared_weight_error(name: str, other: str) -> AdapterError:
    return AdapterError(
        f"{name} and {other} share a LoRA weight, so their ranks cannot differ. Leave tied modules out of "
        "target_modules, or make the adapter without ensure_weight_tying, so that each module has its own LoRA (which "
        "must not be merged into tied base weights then)"
    )


def wrapped_model(model: nn.Module) -> nn.Module:
    """The model that PEFT has wrapped: inside a ``PeftModel`` or a tuner, or ``model`` itself.

    Names in PEFT's patterns are relative to it.
    """
    tuner = getattr(model, "base_model", None)
    for outer in (tuner, model):
        inner = getattr(outer, "model", None)
        if isinstance(inner, nn.Module) and hasattr(outer, "targeted_module_names"):
            return inner
    return model


def _adapter_name(model: nn.Module, configs: Mapping[str, Any], adapter: str | None) -> str:
    if adapter is None:
        names = _active_adapters(model) or list(configs)
        if len(names) != 1:
            raise AdapterError(f"{len(names)} adapters are active ({', '.join(names)}): choose one with adapter=…")
        adapter = names[0]
    if adapter not in configs:
        raise AdapterError(f"there is no adapter {adapter!r}; the model has: {', '.join(configs)}")
    if not isinstance(configs[adapter], LoraConfig):
        raise AdapterError(
            f"adapter {adapter!r} is a {type(configs[adapter]).__name__}, not a LoraConfig: lorank supports LoRA only"
        )
    return adapter


def _active_adapters(model: nn.Module) -> list[str]:
    active = getattr(model, "active_adapters", None)  # a property of PeftModel, a method of PreTrainedModel
    try:
        return list(active() if callable(active) else active or ())
    except ValueError:  # PreTrainedModel raises this if its adapter was loaded by a PeftModel around it
        return []


def _check_supported(name: str, module: LoraLayer, adapter: str) -> None:
    check_base(name, module)
    if module.merged:
        raise AdapterError(f"{name}: adapter {adapter!r} is merged into the base weights. Call model.unmerge_adapter()")
    variant = module.lora_variant.get(adapter)
    own = GatedLora | HeadLora | FusedLora | EmptyConvolution
    if variant is not None and not isinstance(variant, own) and not is_dora(variant):
        raise AdapterError(
            f"{name}: the adapter uses {type(variant).__name__}, whose forward lorank does not support. "
            "Make the adapter as plain LoRA, LoraConfig(init_lora_weights=True), or with use_dora=True"
        )
    if is_convolution(module) and layout_of(module).groups > 1 and module.use_dora.get(adapter):
        raise AdapterError(
            f"{name}: PEFT's DoRA of a convolution with groups computes the norm of another weight, which depends on "
            "the number of ranks. Use LoRA without DoRA, or leave this convolution out of target_modules"
        )
    if getattr(module, "tp_layer", None) is not None:
        raise AdapterError(f"{name}: LoRA weights sharded by tensor parallelism cannot be resized")
