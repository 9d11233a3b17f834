"""The layers of a model take the fused forward while it trains, and give it back: afterwards they are stock PEFT.

What cannot be fused keeps PEFT's forward, and one line of the log says how many modules, and why.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Mapping

from torch import nn

from lorank.lora.kernels.onednn import disable_onednn_, enable_onednn_
from lorank.lora.kernels.sparse_dropout import Dropout
from lorank.lora.layer import AdapterLayer, AdapterLayers
from lorank.lora.variants.fused import FusedLora, fixed_weight
from lorank.lora.variants.gated import GatedLora
from lorank.lora.variants.per_head import HeadLora

logger = logging.getLogger("lorank")


def fuse_(
    layers: AdapterLayers, *, compiled: bool = False, known: Mapping[str, list[str]] | None = None
) -> dict[str, list[str]]:
    """Every layer that can computes by :class:`FusedLora` from here on. Layers that do already stay as they are.

    Their frozen maps take oneDNN's products where these are faster (:mod:`lorank.lora.kernels.onednn`).

    Layers with a LoRA per head have a function of their own, which gets the dropout that all layers share; embeddings
    have no product to fuse, and weights in a pool may be elsewhere until PEFT's own modules are called: those are left
    alone without a word.

    Args:
        compiled: whether ``torch.compile`` will trace the model: nothing is fused then.
        known: what an earlier call returned; what has been logged then is not logged again.

    Returns:
        The names of the layers that keep PEFT's forward, by reason.
    """
    left: dict[str, list[str]] = defaultdict(list)
    variants = {name: layer.module.lora_variant.get(layer.adapter) for name, layer in layers.items()}
    seen = [_within(variant) for variant in variants.values()]
    drawn_by = (variant.dropout for variant in seen if isinstance(variant, FusedLora | HeadLora))
    dropout = next((one for one in drawn_by if one is not None), None) or Dropout()
    fused = 0
    for name, layer in layers.items():
        variant = variants[name]
        own = _within(variant)
        if isinstance(own, FusedLora):
            fused += 1
            continue
        if isinstance(own, HeadLora):
            own.dropout = None if compiled else dropout
            if not compiled:
                enable_onednn_(layer.module.get_base_layer())
        if layer.is_embedding or layer.groups is not None or layer.pool is not None:
            continue
        reason = "torch.compile, which fuses by itself" if compiled else _obstacle(layer)
        if reason is not None:
            left[reason].append(name)
            continue
        fused += 1
        enable_onednn_(layer.module.get_base_layer())
        new = FusedLora(dropout, own)
        if isinstance(variant, GatedLora):
            variant.replaced = new
        else:
            layer.module.lora_variant[layer.adapter] = new
    if left and left != known:
        logger.warning(
            "the fused forward serves %d of %d modules; the others run PEFT's, which is slower: %s",
            fused,
            len(layers),
            "; ".join(f"{len(names)} for {reason}" for reason, names in left.items()),
        )
    return dict(left)


def unfuse_(layers: AdapterLayers) -> None:
    """The inverse of :func:`fuse_`: every layer has the forward again that it had before."""
    for layer in layers.values():
        table = layer.module.lora_variant
        variant = table.get(layer.adapter)
        own = _within(variant)
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
    """Whether ``torch.compile`` has been called on the model or a part of it."""
    return any(
        hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None
        for module in model.modules()
    )


def _within(variant: object) -> object:
    return variant.replaced if isinstance(variant, GatedLora) else variant


def _obstacle(layer: AdapterLayer) -> str | None:
    """Why a layer cannot be fused, or None."""
    module, adapter = layer.module, layer.adapter
    dropout = module.lora_dropout[adapter]
    if module.lora_B[adapter].bias is not None:
        return "lora_bias"
    if not isinstance(dropout, nn.Dropout | nn.Identity):
        return f"a dropout of another kind ({type(dropout).__name__})"
    if layer.min_rank:  # DoRA
        W = fixed_weight(module)
        if W is None or W.dtype != layer.A.dtype:
            return "DoRA on a base layer that is quantised, trained, hooked or of another dtype"
        if isinstance(dropout, nn.Dropout) and dropout.p > 0 and W.device.type != "cpu":
            return "DoRA with dropout on an accelerator"
    return None
