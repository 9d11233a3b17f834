"""Resizes live layers when weights of other ranks are loaded into them.

PEFT and the Trainer load a checkpoint with ``load_state_dict``, which fails on other shapes. A hook before it resizes
the live layers first. The hook serves every way of loading: a resumed run, ``load_best_model_at_end`` and
``model.load_adapter``.

Only modules with weights in the file change, and modules that the file or its folder states at rank 0
(:mod:`lorank.lora.rank_zero`). All other modules keep their ranks, weights, gates and moments, as in PyTorch.

The hook acts on the model that it is called with. A deep copy of the model, or a model from a pickle, has a hook of its
own, which knows nothing of the run: it finds the layers of its own model and resizes them, without an optimiser.

A layer in per-head form takes its blocks from the plain LoRA in the file.

Files hold B with the gate folded in. If all loaded B equal the live B with the live gates folded in, the live B and
gates stay bitwise the same. Otherwise the gates of the loaded modules are set to one.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lorank.errors import AdapterError
from lorank.files import parse_json, read_bounded
from lorank.lora.experts import is_filler
from lorank.lora.find_layers import find_layers
from lorank.lora.io.adapter_validation import CONFIG, MAX_CONFIG_BYTES
from lorank.lora.io.unadapted_modules import wrap_unadapted_keys_
from lorank.lora.kernels.per_head import dense_B
from lorank.lora.layer import AdapterLayer, AdapterLayers
from lorank.lora.pool import Pool, padded
from lorank.lora.rank_zero import EXTRA_STATE, stated_adapters, stated_in_targets
from lorank.lora.resize import resize_
from lorank.lora.resize_plan import LayerPlan, plan_for_heads, plan_for_rank
from lorank.lora.variants.gated import fold_gate
from lorank.lora.variants.per_head import HeadLora, head_ranks_of

logger = logging.getLogger("lorank")

Keys = Mapping[str, tuple[str, str]]
"""For each layer, the keys of A and B in a state dict."""


def resize_on_load(
    layers: AdapterLayers,
    optimizer: torch.optim.Optimizer | None = None,
    on_new_weights: Callable[[], None] | None = None,
) -> ResizeOnLoadHandle:
    """Registers a hook that resizes the layers to the ranks of the weights that are loaded into the model.

    Args:
        layers: all LoRA layers of one adapter.
        optimizer: the optimiser whose state is resized too, or None if there is no optimiser yet.
        on_new_weights: called after loading weights that are not bitwise the weights of the live, gated layers.

    Returns:
        A handle; its ``remove()`` removes the hook from the model. Copies of the model keep theirs.
    """
    model = layers.model
    # The hook is on the model, not on each layer, because the ranks of all layers change together.
    handle = model.register_load_state_dict_pre_hook(  # type: ignore[no-untyped-call]  # untyped in torch
        ResizeOnLoad(layers.adapter, _Run(layers, optimizer, on_new_weights))
    )
    if isinstance(model, PeftModel) and "load_adapter" not in vars(model):
        vars(model)["load_adapter"] = partial(_load_adapter, model)
    return ResizeOnLoadHandle(model, handle)


class ResizeOnLoadHandle:
    """The hook of :func:`resize_on_load` on one model."""

    def __init__(self, model: nn.Module, handle: RemovableHandle) -> None:
        self._model, self._handle = model, handle

    def remove(self) -> None:
        """Removes the hook, and all that belongs to it, from the model."""
        self._handle.remove()
        patched = vars(self._model).get("load_adapter")
        if not _hooks(self._model) and isinstance(patched, partial) and patched.func is _load_adapter:
            del vars(self._model)["load_adapter"]


@dataclass(frozen=True, eq=False)
class _Run:
    """What belongs to the live model alone."""

    layers: AdapterLayers
    optimizer: torch.optim.Optimizer | None
    on_new_weights: Callable[[], None] | None


class ResizeOnLoad:
    """The hook before ``load_state_dict``. Copies and pickles of it hold the adapter's name only.

    Args:
        adapter: the adapter's name.
        run: the layers of the live model and their optimiser; None for a copy of the model.

    Attributes:
        folder_targets: ``target_modules`` of the folder that ``load_adapter`` is loading; else None.
    """

    def __init__(self, adapter: str, run: _Run | None = None) -> None:
        self.adapter = adapter
        self.folder_targets: str | list[str] | None = None
        self._run = run

    def __deepcopy__(self, memo: object) -> ResizeOnLoad:
        return ResizeOnLoad(self.adapter)

    def __reduce__(self) -> tuple[Any, ...]:
        return ResizeOnLoad, (self.adapter,)

    def __call__(
        self,
        module: nn.Module,
        state_dict: MutableMapping[str, Tensor],
        prefix: str,
        *_: Any,
    ) -> None:
        run = self._run
        if run is None:
            try:
                run = _Run(find_layers(module, self.adapter), None, None)
            except AdapterError:
                return  # the copy has no such adapter any more, or has merged it: it loads as without lorank
        layers = run.layers
        empty = {
            name
            for name in layers
            if self.adapter in stated_adapters(state_dict.get(f"{_place(prefix, layers, name)}{EXTRA_STATE}"))
        }
        empty |= wrap_unadapted_keys_(layers, state_dict, prefix)
        _load(run, empty | stated_in_targets(self.folder_targets, layers), prefix, state_dict)


def _load(run: _Run, empty: Iterable[str], prefix: str, state_dict: MutableMapping[str, Tensor]) -> None:
    """Resizes the layers for the weights in ``state_dict``, and converts these to the live form of the layers.

    Args:
        run: the layers of the model into which the weights are loaded.
        empty: the names of the layers that are stated at rank 0.
        prefix: the prefix of the model's keys.
        state_dict: the weights.
    """
    layers = run.layers
    keys = {name: _keys(_place(prefix, layers, name), layer) for name, layer in layers.items()}
    _add_adapter_name(layers, keys, prefix, state_dict)
    empty = {*empty, *_remove_fillers(layers, keys, state_dict)}
    loaded = [name for name in layers if any(key in state_dict for key in keys[name])]
    if not loaded or any(state_dict[key].dim() < 2 for name in loaded for key in keys[name] if key in state_dict):
        return  # weights without this adapter, or with one process's part of it (ZeRO-3)
    # A rank needs both its row of A and its column of B. PyTorch checks the shape of one without the other.
    given = {name: (state_dict[A], state_dict[B]) for name, (A, B) in keys.items() if {A, B} <= state_dict.keys()}
    emptied = [name for name in empty if name not in loaded and layers[name].rank]
    live_gates_kept = not emptied and _keep_live_gates(layers, keys, state_dict)
    heads = {name: _head_ranks(layers[name], A, B) for name, (A, B) in given.items() if layers[name].groups is not None}
    plan = {
        name: plan_for_heads(layers[name].head_ranks, heads[name])
        if name in heads
        else plan_for_rank(layers[name].rank, layers[name].axes[0].rank(A))
        for name, (A, _) in given.items()
    }
    resize_(layers, {**plan, **{name: _no_rank(layers[name]) for name in emptied}}, run.optimizer)
    for name, head_ranks in heads.items():
        _split_state_dict(layers[name], head_ranks, keys[name], state_dict)
    if not live_gates_kept:
        for name in loaded:
            _reset_gate(layers[name], learned=layers.gates is not None)
        if run.on_new_weights is not None:
            run.on_new_weights()
    for name, layer in layers.items():
        if not layer.rank:  # a module of rank 0 is not in a file; its keys must not count as missing
            for key, parameter in zip(keys[name], (layer.A, layer.B), strict=True):
                state_dict.setdefault(key, parameter.detach())
        if layer.pool is not None and all(key in state_dict for key in keys[name]):
            _fill_pool(layer, layer.pool, keys[name], state_dict)
    _warn_of_absent(layers, [name for name, layer in layers.items() if layer.rank and name not in loaded])


def remove_stated_ranks_(
    layers: AdapterLayers, folder: str | Path, optimizer: torch.optim.Optimizer | None = None
) -> None:
    """Takes all ranks from the layers that the adapter in ``folder`` states at rank 0.

    ``model.load_adapter`` does this by itself. Frameworks that load a checkpoint without it (FSDP) need this call after
    it. A layer that has ranks in the folder is unchanged.

    Args:
        layers: all LoRA layers of one adapter, with the weights in ``folder``.
        folder: the adapter's folder; nothing changes if there is no adapter in it.
        optimizer: the optimiser whose state is resized too, or None.
    """
    emptied = [name for name in stated_in_targets(_folder_targets(Path(folder)), layers) if layers[name].rank]
    resize_(layers, {name: _no_rank(layers[name]) for name in emptied}, optimizer)


def _load_adapter(model: PeftModel, *arguments: Any, **options: Any) -> Any:
    """Replaces ``load_adapter`` of one model: tells its hooks which modules the folder states at rank 0."""
    load = type(model).load_adapter
    given = inspect.signature(load).bind(model, *arguments, **options).arguments
    hooks = [hook for hook in _hooks(model) if hook.adapter == given["adapter_name"]]
    targets = _folder_targets(Path(given["model_id"], options.get("subfolder") or ""))
    for hook in hooks:
        hook.folder_targets = targets
    try:
        return load(model, *arguments, **options)
    finally:
        for hook in hooks:
            hook.folder_targets = None


def _hooks(model: nn.Module) -> list[ResizeOnLoad]:
    found = [getattr(wrapped, "hook", None) for wrapped in model._load_state_dict_pre_hooks.values()]
    return [hook for hook in found if isinstance(hook, ResizeOnLoad)]


def _folder_targets(folder: Path) -> str | list[str] | None:
    """``target_modules`` of the adapter in a folder; None if there is none, or it is not on this machine."""
    try:
        config = parse_json(read_bounded(folder / CONFIG, MAX_CONFIG_BYTES))
    except (OSError, ValueError):
        return None  # PEFT reads the folder next, and says what is wrong
    targets = config.get("target_modules") if isinstance(config, dict) else None
    if isinstance(targets, list) and isinstance(config.get("target_parameters"), list):
        targets = [*targets, *config["target_parameters"]]  # the statements are here if only parameters have ranks
    named = isinstance(targets, list) and all(isinstance(name, str) for name in targets)
    return targets if named or isinstance(targets, str) else None


def _warn_of_absent(layers: AdapterLayers, absent: Sequence[str]) -> None:
    if absent:
        logger.warning(
            "the loaded weights say nothing about %d of %d modules (%s%s), which keep their ranks and weights. If they "
            "have rank 0 in these weights, load what states it: a folder that save_pretrained wrote, with "
            "model.load_adapter; a whole state_dict(); or the optimiser's state of the same checkpoint",
            len(absent),
            len(layers),
            ", ".join(absent[:3]),
            ", …" if len(absent) > 3 else "",
        )


def _add_adapter_name(layers: AdapterLayers, keys: Keys, prefix: str, state_dict: MutableMapping[str, Tensor]) -> None:
    """Renames the keys of live layers at rank 0.

    PEFT adds the adapter's name to keys that are in the model's state dict, and these layers have none there.
    """
    for name, layer in layers.items():
        if not layer.rank:
            for key, file_key in zip(keys[name], _file_keys(_place(prefix, layers, name), layer), strict=True):
                if file_key in state_dict:
                    state_dict[key] = state_dict.pop(file_key)


def _no_rank(layer: AdapterLayer) -> LayerPlan:
    """The plan that takes all ranks from a layer."""
    if layer.groups is None:
        return plan_for_rank(layer.rank, 0)
    return plan_for_heads(layer.head_ranks, (0,) * layer.groups.count)


def _keep_live_gates(layers: AdapterLayers, keys: Keys, state_dict: MutableMapping[str, Tensor]) -> bool:
    """Whether the loaded weights are the live weights with the gates folded into B.

    If so, B in ``state_dict`` is replaced by the live B without the gate.
    """
    if all(layer.gate is None for layer in layers.values()):
        return False
    live_B = {}
    for name, layer in layers.items():
        incoming = state_dict.get(keys[name][1])
        if incoming is None:
            continue
        shape = layer.B.shape if layer.is_expert else (layer.d_out, layer.rank)
        if layer.gate is None or layer.gate.dim() != 1 or incoming.shape[:2] != shape[:2]:
            return False
        if not torch.equal(incoming.to(layer.B), _in_file_layout(layer, fold_gate(layer.B, layer.gate, layer.layout))):
            return False
        live_B[keys[name][1]] = _in_file_layout(layer, layer.B.detach())
    state_dict.update(live_B)
    return True


@torch.no_grad()
def _reset_gate(layer: AdapterLayer, *, learned: bool) -> None:
    """Sets a learned gate to one and its gradient to zero. Removes a gate that no run learns (in a copy of a model)."""
    if layer.gate is None:
        return
    if not learned:
        layer.gate = None
        return
    layer.gate.fill_(1)
    if layer.gate.grad is not None:
        layer.gate.grad.zero_()


def _in_file_layout(layer: AdapterLayer, B: Tensor) -> Tensor:
    """B in the layout of a file: (d_out, r)."""
    return B if layer.groups is None else dense_B(B, layer.groups, layer.head_ranks)


def _head_ranks(layer: AdapterLayer, A: Tensor, B: Tensor) -> tuple[int, ...]:
    """The ranks of each head in weights that will be loaded into a layer in per-head form."""
    assert layer.groups is not None
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
    state_dict[key_A], state_dict[key_B] = HeadLora(layer.groups, ranks).compact(state_dict[key_A], state_dict[key_B])


@torch.no_grad()
def _fill_pool(layer: AdapterLayer, pool: Pool, keys: tuple[str, str], state_dict: MutableMapping[str, Tensor]) -> None:
    """Copies the loaded weights to the pool, and pads those in ``state_dict`` for the stored parameters."""
    for key, own, axis in zip(keys, (layer.A, layer.B), (0, 1), strict=True):
        own.copy_(state_dict[key])
        state_dict[key] = padded(state_dict[key], axis, pool.capacity)


def _place(prefix: str, layers: AdapterLayers, name: str) -> str:
    """The prefix of a layer's keys."""
    return f"{prefix}{layers.prefix}{layers[name].path}."


def _remove_fillers(layers: AdapterLayers, keys: Keys, state_dict: MutableMapping[str, Tensor]) -> list[str]:
    """Removes the zeros that stand for parameters at rank 0, and returns the names of these layers."""
    found = []
    for name, layer in layers.items():
        A, B = (state_dict.get(key) for key in keys[name])
        if layer.is_expert and A is not None and B is not None and is_filler(layer.layout.experts, A, B):
            found.append(name)
            for key in keys[name]:
                del state_dict[key]
    return found


def _keys(prefix: str, layer: AdapterLayer) -> tuple[str, str]:
    if layer.is_embedding:
        return f"{prefix}lora_embedding_A.{layer.adapter}", f"{prefix}lora_embedding_B.{layer.adapter}"
    return f"{prefix}lora_A.{layer.adapter}.weight", f"{prefix}lora_B.{layer.adapter}.weight"


def _file_keys(prefix: str, layer: AdapterLayer) -> tuple[str, str]:
    """The keys in a file, without the adapter's name."""
    if layer.is_embedding:
        return f"{prefix}lora_embedding_A", f"{prefix}lora_embedding_B"
    return f"{prefix}lora_A.weight", f"{prefix}lora_B.weight"
