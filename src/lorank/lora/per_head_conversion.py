"""From plain layers to layers with a LoRA per head, and back to the plain LoRA that those are equal to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from lorank.errors import AdapterError
from lorank.lora.kernels.per_head import HeadGroups
from lorank.lora.layer import AdapterLayer, AdapterLayers
from lorank.lora.optimizer_state import unwrap_optimizer
from lorank.lora.plan import LayerPlan, plan_for_heads, plan_for_rank
from lorank.lora.resize import replace_data, resize_, write_patterns
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
    """Gives every head of fresh layers a LoRA of its own, on the same Parameters: A as at first initialisation, B = 0.

    Args:
        layers: all LoRA layers of one adapter, before any training (B = 0).
        groups: the heads, per layer (:func:`lorank.lora.attention_heads.head_groups`); a layer that is not named stays
            plain.
        optimizer: whose state of these parameters starts anew; None: there is none yet.
        r0: ranks of each head; None: as many as the layer has, at most as a head can hold.
        seed: of the new A.

    Raises:
        AdapterError: a layer that has been trained, is merged, or has DoRA, a bias in lora_B or another form already; a
            head that cannot hold ``r0`` ranks.
    """
    inner = unwrap_optimizer(optimizer) if optimizer is not None else None
    plan: dict[str, LayerPlan] = {}
    for name, heads in groups.items():
        layer = layers[name]
        _check_form(layer)
        if layer.B.any():
            raise AdapterError(
                f"{name} has been trained (B is not zero): a trained LoRA cannot be taken apart into heads. Start from "
                "a fresh adapter, or keep one rank per module with heads='module'"
            )
        most = heads.capacity(layer.d_in, layer.d_out)
        rank = min(layer.rank, most) if r0 is None else r0
        if rank > most:
            raise AdapterError(
                f"a head of {name} is {heads.size} wide and can hold at most {most} ranks, not {rank}: name a smaller "
                "r0, or keep one rank per module with heads='module'"
            )
        plan[name] = plan_for_heads([0] * heads.count, [rank] * heads.count)
    for name, heads in groups.items():
        layer = layers[name]
        empty = HeadLora(heads, [0] * heads.count).compact(layer.A.data[:0], layer.B.data[:, :0])
        for parameter, data in zip((layer.A, layer.B), empty, strict=True):
            replace_data(parameter, data)
            if inner is not None:
                inner.state.pop(parameter, None)
        layer.set_heads(heads, [0] * heads.count)
        _restate_widths(layer)
    resize_(layers, plan, optimizer, seed=seed)


@torch.no_grad()
def merge_heads_(layers: AdapterLayers, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Every layer in per-head form becomes the plain LoRA that it is equal to, of rank Σ r_h, on the same Parameters.

    The optimiser's state of its parameters starts anew where their shape changes: what is plain from here on has zeros
    that would train.
    """
    inner = unwrap_optimizer(optimizer) if optimizer is not None else None
    changed = [layer for layer in layers.values() if layer.groups is not None]
    for layer in changed:
        heads = HeadLora(layer.groups, layer.head_ranks)  # type: ignore[arg-type]  # not None, as just seen
        dense = heads.dense(layer.A.data, layer.B.data)
        layer.set_heads(None)
        for parameter, data in zip((layer.A, layer.B), dense, strict=True):
            if data.shape != parameter.shape:
                replace_data(parameter, data)
                if inner is not None:
                    inner.state.pop(parameter, None)
        _restate_widths(layer)
    if changed:
        write_patterns(layers)


@torch.no_grad()
def restore_layout_(layers: AdapterLayers, saved: Mapping[str, tuple[HeadGroups, Sequence[int]]]) -> None:
    """Brings the layers into the form that a run was saved in, whatever form they have.

    A plain layer whose weights are those of heads is taken apart exactly. One that holds other weights, to be replaced
    by those saved, only changes its shape, as does one that has other ranks.

    Args:
        saved: per layer in per-head form, its heads and their ranks; the others are plain.

    Raises:
        AdapterError: a trained layer whose weights are not those of the heads.
    """
    for name, (heads, ranks) in saved.items():
        layer = layers[name]
        if layer.groups is not None and layer.groups != heads:
            raise AdapterError(f"{name} has {layer.groups}, but the run was saved with {heads}")
        if layer.groups is None:
            _check_form(layer)
            fits = layer.rank == sum(ranks) and head_ranks_of(layer.A, layer.B, heads, ranks) == tuple(ranks)
            if layer.B.any() and not fits:
                raise AdapterError(
                    f"the weights of {name} are not those of {heads.count} heads with {sum(ranks)} ranks in all: load "
                    "the weights of the same checkpoint"
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
            _restate_widths(layer)
        elif layer.rank == sum(ranks):
            layer.set_heads(heads, ranks)  # whose a rank is that was zero in a file, the file does not say
        else:
            resize_(layers, {name: plan_for_heads(layer.head_ranks, ranks)})
    write_patterns(layers)


def _check_form(layer: AdapterLayer) -> None:
    own = layer.form
    if layer.groups is not None:
        raise AdapterError(
            f"{layer.name} is in per-head form already: end the run that it belongs to (ranks.finish()), and start the "
            "next one from a fresh adapter"
        )
    if layer.min_rank or own is not None:
        raise AdapterError(
            f"{layer.name} uses {type(own).__name__}, which has no form per head: keep one rank per module with "
            "heads='module'"
        )
    if layer.pool is not None:
        raise AdapterError(
            f"{layer.name} has a fixed shape (lorank.reserve_), which has no form per head: keep one rank per module "
            "with heads='module'"
        )
    if layer.module.merged:
        raise AdapterError(f"{layer.name} is merged into the base weights: call model.unmerge_adapter() first")
    if layer.module.lora_B[layer.adapter].bias is not None:
        raise AdapterError(
            f"{layer.name} has a bias in lora_B, which has no form per head: make the adapter without lora_bias, or "
            "keep one rank per module with heads='module'"
        )


def _restate_widths(layer: AdapterLayer) -> None:
    """PEFT's own fields that say how wide A and B are."""
    layer.module.lora_A[layer.adapter].in_features = layer.A.shape[1]
    layer.module.lora_B[layer.adapter].out_features = layer.B.shape[0]
    layer.module.lora_A[layer.adapter].out_features = layer.module.lora_B[layer.adapter].in_features = layer.rank
