"""Resizes live layers when weights of other ranks are loaded into them.

PEFT and the Trainer load a checkpoint with ``load_state_dict``, which fails on other shapes. A hook before it resizes
the live layers first. The hook serves every way of loading: a resumed run, ``load_best_model_at_end`` and
``model.load_adapter``. A module that is missing in the weights had rank 0 when they were saved.

A layer in per-head form takes its blocks from the plain LoRA in the file.

Files hold B with the gate folded in. If the loaded B equals the live B with the live gate folded in, the live B and
gate stay bitwise the same. Otherwise all gates are set to one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lorank.errors import AdapterError
from lorank.lora.io.unadapted_modules import wrap_unadapted_keys_
from lorank.lora.kernels.per_head import dense_B
from lorank.lora.layer import AdapterLayer, AdapterLayers
from lorank.lora.pool import Pool, padded
from lorank.lora.resize import resize_
from lorank.lora.resize_plan import plan_for_heads, plan_for_rank
from lorank.lora.variants.gated import fold_gate
from lorank.lora.variants.per_head import HeadLora, head_ranks_of


def resize_on_load(
    layers: AdapterLayers,
    optimizer: torch.optim.Optimizer | None = None,
    on_new_weights: Callable[[], None] | None = None,
) -> RemovableHandle:
    """Registers a hook that resizes the layers to the ranks of the weights that are loaded into the model.

    Args:
        layers: all LoRA layers of one adapter.
        optimizer: the optimiser whose state is resized too, or None if there is no optimiser yet.
        on_new_weights: called after loading weights that are not bitwise the weights of the live, gated layers.

    Returns:
        A handle; its ``remove()`` removes the hook.
    """

    def before_load(module: nn.Module, state_dict: MutableMapping[str, Tensor], prefix: str, *_: Any) -> None:
        keys = {name: _keys(f"{prefix}{layers.prefix}{name}.", layer) for name, layer in layers.items()}
        wrap_unadapted_keys_(layers, state_dict, prefix)
        for name, layer in layers.items():
            if not layer.rank:
                # PEFT adds the adapter's name to keys that are in the model's state dict. This layer had none.
                for key, file_key in zip(keys[name], _file_keys(f"{prefix}{layers.prefix}{name}.", layer), strict=True):
                    if file_key in state_dict:
                        state_dict[key] = state_dict.pop(file_key)
        found = {name: state_dict[key_A] for name, (key_A, _) in keys.items() if key_A in state_dict}
        ranks = {name: len(A) for name, A in found.items() if A.dim() == 2}
        if not ranks:
            return  # weights without this adapter, or with parts of it only (ZeRO-3)
        heads = {
            name: _head_ranks(layer, *(state_dict.get(key) for key in keys[name]))
            for name, layer in layers.items()
            if layer.groups is not None
        }
        live_gates_kept = _keep_live_gates(layers, keys, state_dict)
        plan = {
            name: plan_for_heads(layer.head_ranks, heads[name])
            if name in heads
            else plan_for_rank(layer.rank, ranks.get(name, 0))
            for name, layer in layers.items()
        }
        resize_(layers, plan, optimizer)
        for name, head_ranks in heads.items():
            _split_state_dict(layers[name], head_ranks, keys[name], state_dict)
        if layers.gates is not None and not live_gates_kept:
            layers.gates.values.fill_(1)
            layers.gates.clear_grad()
        if not live_gates_kept and on_new_weights is not None:
            on_new_weights()
        for name, layer in layers.items():
            if not layer.rank:  # a module of rank 0 is not in a file; its keys must not count as missing
                for key, parameter in zip(keys[name], (layer.A, layer.B), strict=True):
                    state_dict.setdefault(key, parameter.detach())
            if layer.pool is not None:
                _fill_pool(layer, layer.pool, keys[name], state_dict)

    # The hook is on the model, not on each layer: a layer's hook does not learn that its weights are missing.
    return layers.model.register_load_state_dict_pre_hook(before_load)  # type: ignore[no-untyped-call,no-any-return]  # untyped in torch


def _keep_live_gates(
    layers: AdapterLayers, keys: Mapping[str, tuple[str, str]], state_dict: MutableMapping[str, Tensor]
) -> bool:
    """Whether the loaded weights are the live weights with the gates folded into B.

    If so, B in ``state_dict`` is replaced by the live B without the gate.
    """
    if layers.gates is None:
        return False
    live_B = {}
    for name, layer in layers.items():
        incoming = state_dict.get(keys[name][1])
        if not layer.rank and incoming is None:
            continue
        if incoming is None or layer.gate is None or incoming.shape != (layer.d_out, layer.rank):
            return False
        if not torch.equal(incoming.to(layer.B), _in_file_layout(layer, fold_gate(layer.B, layer.gate))):
            return False
        live_B[keys[name][1]] = _in_file_layout(layer, layer.B.detach())
    state_dict.update(live_B)
    return True


def _in_file_layout(layer: AdapterLayer, B: Tensor) -> Tensor:
    """B in the layout of a file: (d_out, r)."""
    return B if layer.groups is None else dense_B(B, layer.groups, layer.head_ranks)


def _head_ranks(layer: AdapterLayer, A: Tensor | None, B: Tensor | None) -> tuple[int, ...]:
    """The ranks of each head in weights that will be loaded into a layer in per-head form."""
    assert layer.groups is not None
    if A is None or B is None:
        return (0,) * layer.groups.count  # not in the file: the module had rank 0
    found = head_ranks_of(A, B, layer.groups, layer.head_ranks)
    if found is None:
        raise AdapterError(
            f"{layer.name} trains a LoRA per head ({layer.groups.count} heads of width {layer.groups.size}), and the "
            "weights that are loaded into it do not have this form: load a checkpoint of this run, or end the run "
            "first (ranks.finish())"
        )
    return found


def _split_state_dict(
    layer: AdapterLayer, ranks: tuple[int, ...], keys: tuple[str, str], state_dict: MutableMapping[str, Tensor]
) -> None:
    """Replaces the plain LoRA in ``state_dict`` by the blocks of the heads, for the live layer."""
    assert layer.groups is not None
    layer.set_heads(layer.groups, ranks)
    key_A, key_B = keys
    if key_A in state_dict:
        heads = HeadLora(layer.groups, ranks)
        state_dict[key_A], state_dict[key_B] = heads.compact(state_dict[key_A], state_dict[key_B])


@torch.no_grad()
def _fill_pool(layer: AdapterLayer, pool: Pool, keys: tuple[str, str], state_dict: MutableMapping[str, Tensor]) -> None:
    """Copies the loaded weights to the pool, and pads those in ``state_dict`` for the stored parameters."""
    for key, own, axis in zip(keys, (layer.A, layer.B), (0, 1), strict=True):
        own.copy_(state_dict[key])
        state_dict[key] = padded(state_dict[key], axis, pool.capacity)


def _keys(prefix: str, layer: AdapterLayer) -> tuple[str, str]:
    if layer.is_embedding:
        return f"{prefix}lora_embedding_A.{layer.adapter}", f"{prefix}lora_embedding_B.{layer.adapter}"
    return f"{prefix}lora_A.{layer.adapter}.weight", f"{prefix}lora_B.{layer.adapter}.weight"


def _file_keys(prefix: str, layer: AdapterLayer) -> tuple[str, str]:
    """The keys in a file, without the adapter's name."""
    if layer.is_embedding:
        return f"{prefix}lora_embedding_A", f"{prefix}lora_embedding_B"
    return f"{prefix}lora_A.weight", f"{prefix}lora_B.weight"
