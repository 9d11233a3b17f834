"""Switches the layers of a model to the fused forward for training, and back to PEFT's forward afterwards.

Layers that cannot be fused keep PEFT's forward. One line of the log says how many modules these are, and why.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Mapping

from torch import nn

from lorank.lora.kernels.onednn import disable_onednn_, enable_onednn_
from lorank.lora.kernels.sparse_dropout import Dropout
from lorank.lora.layer import AdapterLayer, AdapterLayers
from lorank.lora.variants.fused import FusedLora, frozen_weight
from lorank.lora.variants.gated import GatedLora
from lorank.lora.variants.per_head import HeadLora

logger = logging.getLogger("lorank")


def fuse_(
    layers: AdapterLayers, *, compiled: bool = False, already_logged: Mapping[str, list[str]] | None = None
) -> dict[str, list[str]]:
    """Switches every supported layer to :class:`FusedLora`. Layers that are fused already are unchanged.

    The frozen base layers (linear maps W) of these layers use oneDNN's matrix product where it is faster
    (:mod:`lorank.lora.kernels.onednn`).

    Three kinds of layers are skipped without a line in the log. Layers with a LoRA per head have their own autograd
    function, which gets the dropout that all layers share. Embeddings have no matrix product to fuse. The weights of
    layers with a pool may be gathered only when PEFT's own modules are called (ZeRO-3).

    Args:
        compiled: whether ``torch.compile`` will trace the model. Nothing is fused then.
        already_logged: the result of an earlier call. An equal result is not logged again.

    Returns:
        The names of the layers that keep PEFT's forward, by reason.
    """
    unfused: dict[str, list[str]] = defaultdict(list)
    variants = {name: layer.module.lora_variant.get(layer.adapter) for name, layer in layers.items()}
    seen = [_ungated(variant) for variant in variants.values()]
    drawn_by = (variant.dropout for variant in seen if isinstance(variant, FusedLora | HeadLora))
    dropout = next((one for one in drawn_by if one is not None), None) or Dropout()
    fused = 0
    for name, layer in layers.items():
        variant = variants[name]
        own = _ungated(variant)
        if isinstance(own, FusedLora):
            fused += 1
            continue
        if isinstance(own, HeadLora):
            own.dropout = None if compiled else dropout
            if not compiled:
                enable_onednn_(layer.module.get_base_layer())
        if layer.is_embedding or layer.is_convolution or layer.is_expert:
            continue
        if layer.groups is not None or layer.pool is not None:
            continue
        reason = "torch.compile, which fuses by itself" if compiled else _reason_unfused(layer)
        if reason is not None:
            unfused[reason].append(name)
            continue
        fused += 1
        enable_onednn_(layer.module.get_base_layer())
        new = FusedLora(dropout, own)
        if isinstance(variant, GatedLora):
            variant.replaced = new
        else:
            layer.module.lora_variant[layer.adapter] = new
    if unfused and unfused != already_logged:
        logger.warning(
            "%d of %d modules use the fused forward; the others use PEFT's forward, which is slower: %s",
            fused,
            len(layers),
            "; ".join(f"{len(names)} for {reason}" for reason, names in unfused.items()),
        )
    return dict(unfused)


def unfuse_(layers: AdapterLayers) -> None:
    """The inverse of :func:`fuse_`: restores the forward that every layer had before."""
    for layer in layers.values():
        table = layer.module.lora_variant
        variant = table.get(layer.adapter)
        own = _ungated(variant)
        disable_onednn_(layer.module.get_base_layer())
        if isinstance(own, HeadLora):
            own.dropout = None
        if not isinstance(own, FusedLora):
            continue
        if isinstance(variant, GatedLora):
            variant.replaced = own.replaced
        elif own.replaced is not None:
            table[layer.adapter] = own.replaced
        else:
            del table[layer.adapter]


def is_compiled(model: nn.Module) -> bool:
    """Whether ``torch.compile`` has been called on the model or on one of its modules."""
    return any(
        hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None
        for module in model.modules()
    )


def _ungated(variant: object) -> object:
    return variant.replaced if isinstance(variant, GatedLora) else variant


def _reason_unfused(layer: AdapterLayer) -> str | None:
    """The reason why a layer cannot be fused, or None."""
    module, adapter = layer.module, layer.adapter
    dropout = module.lora_dropout[adapter]
    if module.lora_B[adapter].bias is not None:
        return "lora_bias"
    if not isinstance(dropout, nn.Dropout | nn.Identity):
        return f"an unsupported dropout ({type(dropout).__name__})"
    if layer.uses_dora:
        W = frozen_weight(module)
        if W is None or W.dtype != layer.A.dtype:
            return "DoRA on a base layer that is quantised, trained, has hooks or has another dtype"
        if isinstance(dropout, nn.Dropout) and dropout.p > 0 and W.device.type != "cpu":
            return "DoRA with dropout on an accelerator"
    return None
