"""Converts plain layers to layers with a LoRA per head, and back to the equivalent plain LoRA."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from lorank.errors import AdapterError
from lorank.lora.kernels.per_head import HeadGroups
from lorank.lora.layer import AdapterLayer, AdapterLayers
from lorank.lora.optimizer_state import reset_state, unwrap_optimizer
from lorank.lora.resize import replace_data, resize_, write_patterns
from lorank.lora.resize_plan import LayerPlan, plan_for_heads, plan_for_rank
from lorank.lora.variants.per_head import HeadLora, head_ranks_of


@torch.no_grad()
def split_into_heads_(
    layers: AdapterLayers,
    groups: Mapping[str, HeadGroups],
    optimizer: torch.optim.Optimizer | None = None,
    r0: int | None = None,
    *,
    seed: int = 0,
) -> None:
    """Gives each head of untrained layers its own LoRA, in the same Parameters: A as PEFT initialises it, B = 0.

    Args:
        layers: all LoRA layers of one adapter, before any training (B = 0).
        groups: the heads, per layer (:func:`lorank.lora.attention_heads.head_groups`). A layer without an entry stays
            plain.
        optimizer: the optimiser whose state of these parameters is reset; None: there is no optimiser yet.
        r0: ranks of each head; None: the rank of the layer, but at most the capacity of a head.
        seed: the seed of the new A.

    Raises:
        AdapterError: a layer has been trained, is merged, is in per-head form already, or has DoRA, a bias in lora_B or
            a pool; or a head cannot hold ``r0`` ranks.
    """
    inner = unwrap_optimizer(optimizer) if optimizer is not None else None
    plan: dict[str, LayerPlan] = {}
    for name, heads in groups.items():
        layer = layers[name]
        _check_can_split(layer)
        if layer.B.any():
            raise AdapterError(
                f"{name} has been trained (B is not zero): a trained LoRA cannot be split into heads. Start from a "
                "fresh adapter, or keep one rank per module with heads='module'"
            )
        capacity = heads.capacity(layer.d_in, layer.d_out)
        rank = min(layer.rank, capacity) if r0 is None else r0
        if rank > capacity:
            raise AdapterError(
                f"a head of {name} has width {heads.size} and can hold at most {capacity} ranks, not {rank}: give a "
                "smaller r0, or keep one rank per module with heads='module'"
            )
        plan[name] = plan_for_heads([0] * heads.count, [rank] * heads.count)
    for name, heads in groups.items():
        layer = layers[name]
        empty = HeadLora(heads, [0] * heads.count).compact(layer.A.data[:0], layer.B.data[:, :0])
        for parameter, data in zip((layer.A, layer.B), empty, strict=True):
            replace_data(parameter, data)
            if inner is not None:
                reset_state(inner, parameter)
        layer.set_heads(heads, [0] * heads.count)
        _update_peft_widths(layer)
    resize_(layers, plan, optimizer, seed=seed)


@torch.no_grad()
def merge_heads_(layers: AdapterLayers, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Converts every layer in per-head form to the equivalent plain LoRA of rank Σ r_h, in the same Parameters.

    The optimiser's state of a parameter is reset where its shape changes, because the plain LoRA also trains the zeros
    outside the blocks.
    """
    inner = unwrap_optimizer(optimizer) if optimizer is not None else None
    changed = [layer for layer in layers.values() if layer.groups is not None]
    for layer in changed:
        heads = HeadLora(layer.groups, layer.head_ranks)  # type: ignore[arg-type]  # not None, as checked above
        dense = heads.dense(layer.A.data, layer.B.data)
        layer.set_heads(None)
        for parameter, data in zip((layer.A, layer.B), dense, strict=True):
            if data.shape != parameter.shape:
                replace_data(parameter, data)
                if inner is not None:
                    reset_state(inner, parameter)
        _update_peft_widths(layer)
    if changed:
        write_patterns(layers)


@torch.no_grad()
def restore_layout_(layers: AdapterLayers, saved: Mapping[str, tuple[HeadGroups, Sequence[int]]]) -> None:
    """Converts the layers from their present form to the form in which a run was saved.

    A plain layer with the saved weights of the heads is split into these heads exactly. An untrained plain layer (B =
    0) and a layer in per-head form with other ranks only change their shape; the saved weights are loaded afterwards.

    Args:
        saved: the heads and their ranks for each layer that was saved in per-head form. All other layers are plain.

    Raises:
        AdapterError: the weights of a trained layer are not those of the saved heads.
    """
    for name, (heads, ranks) in saved.items():
        layer = layers[name]
        if layer.groups is not None and layer.groups != heads:
            raise AdapterError(
                f"{name} has {layer.groups}, but the run was saved with {heads}: resume with the run's own settings"
            )
        if layer.groups is None:
            _check_can_split(layer)
            fits = layer.rank == sum(ranks) and head_ranks_of(layer.A, layer.B, heads, ranks) == tuple(ranks)
            if layer.B.any() and not fits:
                raise AdapterError(
                    f"the weights of {name} are not those of {heads.count} heads with {sum(ranks)} ranks in total: "
                    "load the weights of the same checkpoint"
                )
    if any(layer.groups is not None and name not in saved for name, layer in layers.items()):
        merge_heads_(layers)
    for name, (heads, ranks) in saved.items():
        layer = layers[name]
        if layer.groups is None:
            resize_(layers, {name: plan_for_rank(layer.rank, sum(ranks))})
            compacted = HeadLora(heads, ranks).compact(layer.A.data, layer.B.data)
            for parameter, data in zip((layer.A, layer.B), compacted, strict=True):
                replace_data(parameter, data.clone())
            layer.set_heads(heads, ranks)
            _update_peft_widths(layer)
        elif layer.rank == sum(ranks):
            layer.set_heads(heads, ranks)  # for a rank that is all zeros in a file, the file does not tell the head
        else:
            resize_(layers, {name: plan_for_heads(layer.head_ranks, ranks)})
    write_patterns(layers)


@torch.no_grad()
def split_again_(
    layers: AdapterLayers,
    saved: Mapping[str, tuple[HeadGroups, Sequence[int]]],
    optimizer: torch.optim.Optimizer | None = None,
) -> None:
    """The inverse of :func:`merge_heads_`, for layers whose weights still are those of the heads.

    Args:
        saved: the heads and their ranks for each layer that was merged.
        optimizer: the optimiser. Its state of a parameter is reset where the shape changes.

    Raises:
        AdapterError: the weights of a trained layer are not those of the heads. Nothing has changed.
    """
    before = {weight: weight.shape for layer in layers.values() for weight in (layer.A, layer.B)}
    restore_layout_(layers, saved)
    if optimizer is not None:
        for weight, shape in before.items():
            if weight.shape != shape:
                unwrap_optimizer(optimizer).state.pop(weight, None)


def _check_can_split(layer: AdapterLayer) -> None:
    own = layer.form
    if layer.groups is not None:
        raise AdapterError(
            f"{layer.name} is in per-head form already: end its run with ranks.finish(), and start the next run from a "
            "fresh adapter"
        )
    if own is not None:
        raise AdapterError(
            f"{layer.name} uses {type(own).__name__}, which has no per-head form: keep one rank per module with "
            "heads='module'"
        )
    if layer.pool is not None:
        raise AdapterError(
            f"{layer.name} has a fixed shape (lorank.reserve_), which has no per-head form: keep one rank per module "
            "with heads='module'"
        )
    if layer.module.merged:
        raise AdapterError(f"{layer.name} is merged into the base weights: call model.unmerge_adapter() first")
    if layer.module.lora_B[layer.adapter].bias is not None:
        raise AdapterError(
            f"{layer.name} has a bias in lora_B, which has no per-head form: make the adapter without lora_bias, or "
            "keep one rank per module with heads='module'"
        )


def _update_peft_widths(layer: AdapterLayer) -> None:
    """Updates PEFT's fields for the widths of A and B."""
    layer.module.lora_A[layer.adapter].in_features = layer.A.shape[1]
    layer.module.lora_B[layer.adapter].out_features = layer.B.shape[0]
    layer.module.lora_A[layer.adapter].out_features = layer.module.lora_B[layer.adapter].in_features = layer.rank
