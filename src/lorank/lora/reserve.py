"""Pads the parameters of LoRA layers to a fixed shape with space for more ranks (:mod:`lorank.lora.pool`)."""

from __future__ import annotations

from functools import partial
from typing import Any, TypeVar

import torch
from torch import nn

from lorank.errors import AdapterError
from lorank.lora.find_layers import find_layers
from lorank.lora.layer import AdapterLayer
from lorank.lora.pool import POOLS, Pool, padded
from lorank.lora.resize import replace_data
from lorank.lora.variants.gated import to_plain_lora, update_plain_lora_hooks

Model = TypeVar("Model", bound=nn.Module)


@torch.no_grad()
def reserve_(model: Model, max_rank: int | None = None, adapter: str | None = None) -> Model:
    """Reserves space for ``max_rank`` ranks in every LoRA layer, in place. Call it before ``deepspeed.initialize``.

        model = lorank.reserve_(get_peft_model(base, LoraConfig(r=8)), max_rank=16)
        engine, optimizer, _, _ = deepspeed.initialize(model=model, …)
        ranks = lorank.attach(engine, optimizer, …)

    The outputs of the model do not change, and saved files contain the live ranks only.

    Args:
        model: a model with a LoRA adapter, not sharded over processes.
        max_rank: R, the maximum rank of a module during training. ≥ the present rank of every module. At most
            min(d_in, d_out) ranks are reserved. None: the present rank, which is enough for methods that only remove
            ranks.
        adapter: the adapter's name; None: the active adapter.

    Returns:
        The same object.

    Raises:
        AdapterError: a layer has more than ``max_rank`` ranks, has reserved ranks already, or cannot have a fixed
            shape: an embedding, a convolution, a parameter, DoRA, a LoRA per head, gates.
    """
    layers = find_layers(model, adapter)
    for name, layer in layers.items():
        _check_can_reserve(layer, max_rank)
        if layer.pool is not None:
            raise AdapterError(f"{name} has {layer.pool.capacity} reserved ranks already: call reserve_ only once")
    for layer in layers.values():
        capacity = layer.rank if max_rank is None else max(layer.rank, min(max_rank, layer.max_rank))
        pool = Pool(layer.A, layer.B, capacity)
        stored = layer.A, layer.B
        for parameter, data in zip(stored, (padded(layer.A, 0, capacity), padded(layer.B, 1, capacity)), strict=True):
            replace_data(parameter, data)
        vars(layer.module).setdefault(POOLS, {})[layer.adapter] = pool
        update_plain_lora_hooks(layer.module)
    if hasattr(model, "save_pretrained"):
        vars(model)["save_pretrained"] = partial(_save_plain_lora, model)  # a copy of the model saves the copy
    return model


def _save_plain_lora(model: Any, *arguments: Any, **options: Any) -> Any:
    """Replaces ``save_pretrained``: converts the padded parameters that DeepSpeed passes in to plain LoRA.

    DeepSpeed gathers ZeRO-3's parameters without calling the state-dict hooks.
    """
    given = options.get("state_dict")
    if given is not None:
        options["state_dict"] = given = dict(given)
        for prefix, module in model.named_modules():
            for adapter in vars(module).get(POOLS, {}):
                stored = module.lora_A[adapter].weight, module.lora_B[adapter].weight
                keys = f"{prefix}.lora_A.{adapter}.weight", f"{prefix}.lora_B.{adapter}.weight"
                if not hasattr(stored[0], "ds_id") or keys[0] not in given:
                    continue  # from a state dict, whose hooks have converted it to plain LoRA
                given[keys[0]], given[keys[1]] = to_plain_lora(module, adapter, given[keys[0]], given[keys[1]])
                if not module.r[adapter]:
                    del given[keys[0]], given[keys[1]]
    return type(model).save_pretrained(model, *arguments, **options)


def _check_can_reserve(layer: AdapterLayer, max_rank: int | None) -> None:
    reason = None
    if layer.is_embedding:
        reason = "is an embedding"
    elif layer.is_convolution:
        reason = "is a convolution"
    elif layer.is_expert:
        reason = "is a parameter"
    elif layer.form is not None:
        reason = "uses DoRA" if layer.uses_dora else "has a LoRA per head"
    elif layer.gate is not None:
        reason = "has gates"
    if reason is not None:
        raise AdapterError(f"{layer.name} {reason}: ranks can only be reserved for a plain LoRA of a linear layer")
    if max_rank is not None and max_rank < layer.rank:
        raise AdapterError(
            f"reserve_(max_rank={max_rank}): {layer.name} has {layer.rank} ranks; give at least {layer.rank}"
        )
