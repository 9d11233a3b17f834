"""Detects the attention heads of each adapted projection.

A projection of H heads of width d_h consists of H stacked linear maps. In q, k and v each head owns d_h rows of W. In
the output projection each head owns d_h columns of W:

    rows:     ΔW = [B_1 A_1; …; B_H A_H]     B_h: (d_h, r_h)     A_h: (r_h, d_in)
    columns:  ΔW = [B_1 A_1, …, B_H A_H]     B_h: (d_out, r_h)   A_h: (r_h, d_h)

With grouped-query attention, k and v have fewer heads than q; the heads are counted per projection. Fused projections
(GPT-2's c_attn, Phi-3's qkv_proj, query_key_value) are stacked rows too, in the order in which the model stacks them.
Modules without heads (FFN, embeddings) have no entry: all their ranks form one group.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, Literal

from torch import nn

from lorank.errors import AdapterError
from lorank.lora.kernels.per_head import HeadGroups
from lorank.lora.layer import AdapterLayer, AdapterLayers

logger = logging.getLogger("lorank")

# Names of projections inside the attention modules of transformers' models. A name alone is not enough: T5's FFN also
# has a `wo` and GPT-2's FFN a `c_proj`, both outside of any attention module.
_ROWS = """q_proj k_proj v_proj query key value q k v q_lin k_lin v_lin q_attn wq wk wv to_q to_k to_v
    c_attn qkv_proj query_key_value qkv Wqkv in_proj"""
_COLUMNS = "o_proj out_proj out_lin o c_proj dense wo Wo proj projection"
ROWS, COLUMNS = frozenset(_ROWS.split()), frozenset(_COLUMNS.split())
WIDTHS = ("head_dim", "attention_head_size", "key_value_proj_dim", "d_kv", "head_size")


def head_groups(
    layers: AdapterLayers, overrides: Mapping[str, HeadGroups | None] | None = None
) -> dict[str, HeadGroups]:
    """Finds the heads of every adapted projection that has heads, by layer name, in the order of the layers.

    A projection is recognised by its name inside an attention module. The width of a head is read from an attribute of
    the attention module, or from the nearest configuration (``head_dim``, or ``hidden_size / num_attention_heads``).

    Args:
        layers: all LoRA layers, in plain form.
        overrides: the heads of single layers, or None for no heads. A key is a layer's full name or the end of it, e.g.
            ``"attn.proj"``. If several keys match a layer, the longest one wins.

    Raises:
        AdapterError: the heads do not divide a projection, or an override matches no layer.
    """
    overrides = dict(overrides or {})
    for key in overrides:
        if not any(_matches_suffix(name, key) for name in layers):
            raise AdapterError(
                f"heads are given for {key!r}, which matches none of the {len(layers)} adapted modules: name a module "
                f"in full, e.g. {next(iter(layers))}, or give the end of its name"
            )
    found: dict[str, HeadGroups] = {}
    for name, layer in layers.items():
        fitting = [key for key in overrides if _matches_suffix(name, key)]
        groups = overrides[max(fitting, key=len)] if fitting else _detect_heads(layers, layer)
        if groups is None:
            continue
        if layer.is_embedding or layer.is_convolution or layer.is_expert:
            kind = "an embedding" if layer.is_embedding else "a parameter" if layer.is_expert else "a convolution"
            raise AdapterError(f"{name} is {kind}, which has no heads: remove it from the given heads")
        width = layer.d_out if groups.kind == "rows" else layer.d_in
        if groups.count * groups.size != width:
            side = "output rows" if groups.kind == "rows" else "input columns"
            raise AdapterError(
                f"{name} has {width} {side}, but {groups.count} heads of width {groups.size} have "
                f"{groups.count * groups.size}: give the right heads, or none with {{{name!r}: None}}"
            )
        found[name] = groups
    return found


def _matches_suffix(name: str, key: str) -> bool:
    return name == key or name.endswith(f".{key}")


def _detect_heads(layers: AdapterLayers, layer: AdapterLayer) -> HeadGroups | None:
    *path, own = layer.name.split(".")
    kind: Literal["rows", "columns"]
    if own in ROWS:
        kind = "rows"
    elif own in COLUMNS:
        kind = "columns"
    else:
        return None
    if layer.is_embedding or layer.is_convolution or layer.is_expert:
        return None
    ancestors = [_submodule(layers, path[:depth]) for depth in range(len(path), -1, -1)]  # innermost first
    # Only the two nearest ancestors count: a projection is at most two modules deep in its attention (BERT), and the
    # class of the whole model may have any name.
    attentions = [module for module in ancestors[:2] if "Attention" in type(module).__name__]
    if not attentions:
        return None
    size = _head_width(attentions, ancestors)
    if size is None:
        logger.warning(
            "%s is in a %s whose head width was not found: all its ranks form one group. Give its heads with "
            "heads={%r: HeadGroups(%r, count, size)}",
            layer.name,
            type(attentions[0]).__name__,
            layer.name,
            kind,
        )
        return None
    width = layer.d_out if kind == "rows" else layer.d_in
    return HeadGroups(kind, max(1, width // size), size)


def _submodule(layers: AdapterLayers, path: list[str]) -> nn.Module:
    return layers.model.get_submodule((layers.prefix + ".".join(path)).rstrip("."))


def _head_width(attentions: list[nn.Module], ancestors: list[nn.Module]) -> int | None:
    """Reads d_h from the attention module, its children (for BERT's output projection) or a configuration."""
    for module in [*attentions, *(child for attention in attentions for child in attention.children())]:
        for attribute in WIDTHS:
            if (size := _as_positive_int(getattr(module, attribute, None))) is not None:
                return size
    for module in ancestors:
        config: Any = getattr(module, "config", None)
        for attribute in WIDTHS:
            if (size := _as_positive_int(getattr(config, attribute, None))) is not None:
                return size
        heads, hidden = (_as_positive_int(getattr(config, key, None)) for key in ("num_attention_heads", "hidden_size"))
        if heads and hidden:
            if hidden % heads:
                raise AdapterError(
                    f"{type(module).__name__}'s configuration has hidden_size={hidden}, which is not divisible by "
                    f"{heads} heads: give the heads of each module"
                )
            return hidden // heads
    return None


def _as_positive_int(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None
