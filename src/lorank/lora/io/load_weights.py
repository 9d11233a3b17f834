"""Weights of other ranks may be loaded into a live model: the layers take the ranks of what arrives.

PEFT and the Trainer load a checkpoint by ``load_state_dict``, which fails on other shapes. A hook that runs just before
resizes the live layers first, whoever does the loading: a resumed run, ``load_best_model_at_end``,
``model.load_adapter``. A module that the weights leave out was at rank 0 when they were saved.

A layer in per-head form takes its blocks out of the plain LoRA that a file holds.

Files hold B with the gate folded in. Where that is what the live layers have, their B and gates stay as they are, to
the last bit; other weights come with gates of one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lorank.errors import AdapterError
from lorank.lora.kernels.per_head import dense_B
from lorank.lora.layer import AdapterLayer, AdapterLayers
from lorank.lora.plan import plan_for_heads, plan_for_rank
from lorank.lora.pool import Pool, padded
from lorank.lora.resize import resize_
from lorank.lora.variants.gated import folded
from lorank.lora.variants.per_head import HeadLora, head_ranks_of


def resize_on_load(
    layers: AdapterLayers,
    optimizer: torch.optim.Optimizer | None = None,
    on_new_weights: Callable[[], None] | None = None,
) -> RemovableHandle:
    """From now on, loading weights resizes the layers to the ranks of those weights.

    Args:
        layers: all LoRA layers of one adapter.
        optimizer: the optimiser whose state follows, or None if there is none yet.
        on_new_weights: called when the weights that are loaded are not, to the last bit, those of gated live layers.

    Returns:
        A handle; its ``remove()`` ends this.
    """

    def before_load(module: nn.Module, state_dict: MutableMapping[str, Tensor], prefix: str, *unused: Any) -> None:
        keys = {name: _keys(f"{prefix}{layers.prefix}{name}.", layer) for name, layer in layers.items()}
        for name, layer in layers.items():
            if not layer.rank:
                # PEFT inserts the adapter's name where the model shows a weight; here it showed none.
                for key, bare in zip(keys[name], _bare_keys(f"{prefix}{layers.prefix}{name}.", layer), strict=True):
                    if bare in state_dict:
                        state_dict[key] = state_dict.pop(bare)
        found = {name: state_dict[key_A] for name, (key_A, _) in keys.items() if key_A in state_dict}
        ranks = {name: len(A) for name, A in found.items() if A.dim() == 2}
        if not ranks:
            return  # these weights are about something else, or each process has its part of them (ZeRO-3)
        heads = {
            name: _head_ranks(layer, *(state_dict.get(key) for key in keys[name]))
            for name, layer in layers.items()
            if layer.groups is not None
        }
        kept = _keep_gated(layers, keys, state_dict)
        plan = {
            name: plan_for_heads(layer.head_ranks, heads[name])
            if name in heads
            else plan_for_rank(layer.rank, ranks.get(name, 0))
            for name, layer in layers.items()
        }
        resize_(layers, plan, optimizer)
        for name, head_ranks in heads.items():
            _take_apart(layers[name], head_ranks, keys[name], state_dict)
        if layers.gates is not None and not kept:
            layers.gates.values.fill_(1)
            layers.gates.clear_grad()
        if not kept and on_new_weights is not None:
            on_new_weights()
        for name, layer in layers.items():
            if not layer.rank:  # nothing was saved for it, and nothing is missing
                for key, parameter in zip(keys[name], (layer.A, layer.B), strict=True):
                    state_dict.setdefault(key, parameter.detach())
            if layer.pool is not None:
                _fill_pool(layer, layer.pool, keys[name], state_dict)

    # On the whole model, not on the layers: a layer is not even shown that the weights say nothing about it.
    return layers.model.register_load_state_dict_pre_hook(before_load)  # type: ignore[no-untyped-call,no-any-return]  # untyped in torch


def _keep_gated(
    layers: AdapterLayers, keys: Mapping[str, tuple[str, str]], state_dict: MutableMapping[str, Tensor]
) -> bool:
    """Whether the weights are the live ones, folded; if so, ``state_dict`` gets the live, unfolded ones instead."""
    if layers.gates is None:
        return False
    mine = {}
    for name, layer in layers.items():
        incoming = state_dict.get(keys[name][1])
        if not layer.rank and incoming is None:
            continue
        if incoming is None or layer.gate is None or incoming.shape != (layer.d_out, layer.rank):
            return False
        if not torch.equal(incoming.to(layer.B), _shown(layer, folded(layer.B, layer.gate))):
            return False
        mine[keys[name][1]] = _shown(layer, layer.B.detach())
    state_dict.update(mine)
    return True


def _shown(layer: AdapterLayer, B: Tensor) -> Tensor:
    """B as a file has it: (d_out, r)."""
    return B if layer.groups is None else dense_B(B, layer.groups, layer.head_ranks)


def _head_ranks(layer: AdapterLayer, A: Tensor | None, B: Tensor | None) -> tuple[int, ...]:
    """The ranks of each head in weights that are about to be loaded into a layer in per-head form."""
    assert layer.groups is not None
    if A is None or B is None:
        return (0,) * layer.groups.count  # left out of the file: it was at rank 0
    found = head_ranks_of(A, B, layer.groups, layer.head_ranks)
    if found is None:
        raise AdapterError(
            f"{layer.name} trains a LoRA per head ({layer.groups.count} heads of {layer.groups.size}), and the weights "
            "that are loaded into it are not of that form: load a checkpoint of this run, or end it first "
            "(ranks.finish())"
        )
    return found


def _take_apart(
    layer: AdapterLayer, ranks: tuple[int, ...], keys: tuple[str, str], state_dict: MutableMapping[str, Tensor]
) -> None:
    """Replaces the plain LoRA in ``state_dict`` by its blocks, as the live layer has them."""
    assert layer.groups is not None
    layer.set_heads(layer.groups, ranks)
    key_A, key_B = keys
    if key_A in state_dict:
        heads = HeadLora(layer.groups, ranks)
        state_dict[key_A], state_dict[key_B] = heads.compact(state_dict[key_A], state_dict[key_B])


@torch.no_grad()
def _fill_pool(layer: AdapterLayer, pool: Pool, keys: tuple[str, str], state_dict: MutableMapping[str, Tensor]) -> None:
    """The pool has what arrives, and the stored parameters will have it with zeros behind."""
    for key, own, axis in zip(keys, (layer.A, layer.B), (0, 1), strict=True):
        own.copy_(state_dict[key])
        state_dict[key] = padded(state_dict[key], axis, pool.capacity)


def _keys(prefix: str, layer: AdapterLayer) -> tuple[str, str]:
    if layer.is_embedding:
        return f"{prefix}lora_embedding_A.{layer.adapter}", f"{prefix}lora_embedding_B.{layer.adapter}"
    return f"{prefix}lora_A.{layer.adapter}.weight", f"{prefix}lora_B.{layer.adapter}.weight"


def _bare_keys(prefix: str, layer: AdapterLayer) -> tuple[str, str]:
    """As in a file: without the adapter's name."""
    if layer.is_embedding:
        return f"{prefix}lora_embedding_A", f"{prefix}lora_embedding_B"
    return f"{prefix}lora_A.weight", f"{prefix}lora_B.weight"
