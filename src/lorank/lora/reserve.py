"""Room for more ranks in parameters of fixed shape (:mod:`lorank.lora.pool`), for DeepSpeed's ZeRO."""

from __future__ import annotations

from types import MethodType
from typing import Any, TypeVar

import torch
from torch import nn

from lorank.errors import AdapterError
from lorank.lora.find_layers import find_layers
from lorank.lora.layer import AdapterLayer
from lorank.lora.pool import POOLS, Pool, padded
from lorank.lora.resize import replace_data
from lorank.lora.variants.gated import plain_form, show_plain

Model = TypeVar("Model", bound=nn.Module)


@torch.no_grad()
def reserve_(model: Model, max_rank: int | None = None, adapter: str | None = None) -> Model:
    """Gives every LoRA layer room for ``max_rank`` ranks, in place, for DeepSpeed's ZeRO, before it sees the model.

        model = lorank.reserve_(get_peft_model(base, LoraConfig(r=8)), max_rank=16)
        engine, optimizer, _, _ = deepspeed.initialize(model=model, …)
        ranks = lorank.attach(engine, optimizer, …)

    The model computes and saves what it did before: files show the ranks that are there.

    Args:
        model: a model with a LoRA adapter, whole in this process.
        max_rank: R, the most ranks that a module can come to have; at most min(d_in, d_out) are reserved. ≥ the ranks
            that are there. None: as many as are there, which is enough for methods that only take away.
        adapter: its name; None: the active one.

    Returns:
        The same object.

    Raises:
        AdapterError: a layer that has more ranks already, room already, or a form that cannot have any: an embedding,
            DoRA, a LoRA per head, gates.
    """
    layers = find_layers(model, adapter)
    for name, layer in layers.items():
        _check(layer, max_rank)
        if layer.pool is not None:
            raise AdapterError(f"{name} has room for {layer.pool.capacity} ranks already: reserve_ is called once")
    for layer in layers.values():
        room = layer.rank if max_rank is None else max(layer.rank, min(max_rank, layer.max_rank))
        pool = Pool(layer.A, layer.B, room)
        stored = layer.A, layer.B
        for parameter, data in zip(stored, (padded(layer.A, 0, room), padded(layer.B, 1, room)), strict=True):
            replace_data(parameter, data)
        vars(layer.module).setdefault(POOLS, {})[layer.adapter] = pool
        show_plain(layer.module)
    if hasattr(model, "save_pretrained"):
        vars(model)["save_pretrained"] = MethodType(_save_plain, model)
    return model


def _save_plain(self: Any, *arguments: Any, **options: Any) -> Any:
    """``save_pretrained``: DeepSpeed collects ZeRO-3's parameters past all hooks, and they come here in fixed shape."""
    given = options.get("state_dict")
    if given is not None:
        options["state_dict"] = given = dict(given)
        for prefix, module in self.named_modules():
            for adapter in vars(module).get(POOLS, {}):
                stored = module.lora_A[adapter].weight, module.lora_B[adapter].weight
                keys = f"{prefix}.lora_A.{adapter}.weight", f"{prefix}.lora_B.{adapter}.weight"
                if not hasattr(stored[0], "ds_id") or keys[0] not in given:
                    continue  # taken from a state dict, which shows plain LoRA
                given[keys[0]], given[keys[1]] = plain_form(module, adapter, given[keys[0]], given[keys[1]])
                if not module.r[adapter]:
                    del given[keys[0]], given[keys[1]]
    return type(self).save_pretrained(self, *arguments, **options)


def _check(layer: AdapterLayer, max_rank: int | None) -> None:
    what = None
    if layer.is_embedding:
        what = "is an embedding"
    elif layer.form is not None:
        what = "uses DoRA" if layer.min_rank else "has a LoRA per head"
    elif layer.gate is not None:
        what = "has gates"
    if what is not None:
        raise AdapterError(f"{layer.name} {what}: ranks can only be reserved for a plain LoRA of a linear layer")
    if max_rank is not None and max_rank < layer.rank:
        raise AdapterError(f"reserve_(max_rank={max_rank}): {layer.name} has {layer.rank} ranks; name at least as many")
