"""Which projections consist of attention heads, and how.

A projection of H heads of width d_h is H stacked maps. For q, k and v a head owns d_h rows of the output, for the
output projection d_h columns of the input:

    rows:     ΔW = [B_1 A_1; …; B_H A_H]     B_h: (d_h, r_h)     A_h: (r_h, d_in)
    columns:  ΔW = [B_1 A_1, …, B_H A_H]     B_h: (d_out, r_h)   A_h: (r_h, d_h)

With grouped-query attention k and v have fewer heads than q; each projection counts its own. Fused projections (GPT-2's
c_attn, Phi-3's qkv_proj, query_key_value) are stacked rows too, in whatever order the model stacks them. What has no
heads (FFN, embeddings) has no entry: it is one group.
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

# How projections are called inside a module whose class is an attention, in transformers' models. A name alone decides
# nothing: T5's FFN has a `wo` and GPT-2's a `c_proj` too, outside of any attention.
_ROWS = """q_proj k_proj v_proj query key value q k v q_lin k_lin v_lin q_attn wq wk wv to_q to_k to_v
    c_attn qkv_proj query_key_value qkv Wqkv in_proj"""
_COLUMNS = "o_proj out_proj out_lin o c_proj dense wo Wo proj projection"
ROWS, COLUMNS = frozenset(_ROWS.split()), frozenset(_COLUMNS.split())
WIDTHS = ("head_dim", "attention_head_size", "key_value_proj_dim", "d_kv", "head_size")


def head_groups(
    layers: AdapterLayers, overrides: Mapping[str, HeadGroups | None] | None = None
) -> dict[str, HeadGroups]:
    """The heads of every adapted projection that has some, by layer name, in the layers' order.

    Heads are found in the model itself: a projection by its name inside an attention module, the width of a head where
    the attention keeps it, or in the nearest configuration (``head_dim``, or ``hidden_size / num_attention_heads``).

    Args:
        layers: all LoRA layers, in plain form.
        overrides: per layer name (the full one, or its end, e.g. ``"attn.proj"``; the longest that fits wins), its
            heads, or None: no heads.

    Raises:
        AdapterError: heads that do not divide a projection, or an override that names no layer.
    """
    overrides = dict(overrides or {})
    for key in overrides:
        if not any(_ends(name, key) for name in layers):
            raise AdapterError(
                f"heads are given for {key!r}, which is none of the {len(layers)} adapted modules, e.g. "
                f"{next(iter(layers))}: name a module, or the end of its name"
            )
    found: dict[str, HeadGroups] = {}
    for name, layer in layers.items():
        fitting = [key for key in overrides if _ends(name, key)]
        groups = overrides[max(fitting, key=len)] if fitting else _find(layers, layer)
        if groups is None:
            continue
        if layer.is_embedding:
            raise AdapterError(f"{name} is an embedding, which has no heads: leave it out of the heads that are given")
        width = layer.d_out if groups.kind == "rows" else layer.d_in
        if groups.count * groups.size != width:
            side = "output rows" if groups.kind == "rows" else "input columns"
            raise AdapterError(
                f"{name} has {width} {side}, which are not {groups.count} heads of width {groups.size} "
                f"(= {groups.count * groups.size}): say what its heads are, or give it none with {{{name!r}: None}}"
            )
        found[name] = groups
    return found


def _ends(name: str, key: str) -> bool:
    return name == key or name.endswith(f".{key}")


def _find(layers: AdapterLayers, layer: AdapterLayer) -> HeadGroups | None:
    *path, own = layer.name.split(".")
    kind: Literal["rows", "columns"]
    if own in ROWS:
        kind = "rows"
    elif own in COLUMNS:
        kind = "columns"
    else:
        return None
    if layer.is_embedding:
        return None
    ancestors = [_submodule(layers, path[:depth]) for depth in range(len(path), -1, -1)]  # innermost first
    # The model's own class may be called anything; a projection is at most two modules deep in its attention (BERT).
    within = [module for module in ancestors[:2] if "Attention" in type(module).__name__]
    if not within:
        return None
    size = _width(within, ancestors)
    if size is None:
        logger.warning(
            "%s is in a %s whose head width is nowhere to be found: it counts as one group. Say what its heads are "
            "with heads={%r: HeadGroups(%r, count, size)}",
            layer.name,
            type(within[0]).__name__,
            layer.name,
            kind,
        )
        return None
    width = layer.d_out if kind == "rows" else layer.d_in
    return HeadGroups(kind, max(1, width // size), size)


def _submodule(layers: AdapterLayers, path: list[str]) -> nn.Module:
    return layers.model.get_submodule((layers.prefix + ".".join(path)).rstrip("."))


def _width(within: list[nn.Module], ancestors: list[nn.Module]) -> int | None:
    """d_h: as the attention keeps it (BERT's output projection finds it in its sibling), or from a configuration."""
    for module in [*within, *(child for attention in within for child in attention.children())]:
        for attribute in WIDTHS:
            if (size := _whole(getattr(module, attribute, None))) is not None:
                return size
    for module in ancestors:
        config: Any = getattr(module, "config", None)
        for attribute in WIDTHS:
            if (size := _whole(getattr(config, attribute, None))) is not None:
                return size
        heads, hidden = (_whole(getattr(config, key, None)) for key in ("num_attention_heads", "hidden_size"))
        if heads and hidden:
            if hidden % heads:
                raise AdapterError(
                    f"{type(module).__name__}'s configuration has hidden_size={hidden}, which {heads} heads do not "
                    "divide: say what the heads are, per module"
                )
            return hidden // heads
    return None


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None
