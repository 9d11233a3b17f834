"""EVA (Paischer et al., arXiv 2410.07170) by PEFT's own code: A from the directions in which a module's inputs vary.

PEFT computes, per module, the principal components of its inputs over batches, and gives the ranks to the components
that explain most of their module's variance. Its ``initialize_lora_eva_weights`` asks for an adapter that was made with
``init_lora_weights="eva"``; the computation behind it, ``get_eva_state_dict``, takes any configuration, so that an
ordinary adapter will do.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora.config import EvaConfig
from peft.tuners.lora.eva import get_eva_state_dict
from torch import Tensor

from lorank.errors import AdapterError, ValidationBatchError
from lorank.lora.layer import AdapterLayers

RHO = 2.0
"""PEFT's default: a module receives at most twice the ranks that it began with."""


def eva_components(
    layers: AdapterLayers, batches: Sequence[Mapping[str, Any]], ranks: Mapping[str, int], caps: Mapping[str, int]
) -> dict[str, Tensor]:
    """What EVA would put into A, for as many ranks in all as ``ranks`` has. The model is left as it was.

    Args:
        layers: all LoRA layers; embeddings are left out, EVA does not know them.
        batches: arguments of the model's forward; padding (attention_mask) and prompts (labels −100) do not count.
            PEFT goes through them again and again until the components stand.
        ranks: per module, what it would have by itself.
        caps: per module, the most it may have. EVA's ρ, the factor by which a module may grow, is 2, or as much less
            as the tightest of them demands.

    Returns:
        Per module (rank, d_in), by importance; (0, d_in) where a module receives nothing.

    Raises:
        AdapterError: the model is not a PeftModel.
        ValidationBatchError: no batch, or a batch with fewer inputs to some module than components are wanted.
    """
    if not isinstance(layers.model, PeftModel):
        raise AdapterError(
            f"EVA needs a PeftModel, and this is a {type(layers.model).__name__} with an adapter in it: make the model "
            "with get_peft_model"
        )
    if not batches:
        raise ValidationBatchError("there is no batch to compute EVA on: give at least one")
    linear = {name: layer for name, layer in layers.items() if not layer.is_embedding and ranks[name]}
    if not linear:
        return {}
    rho = max(1.0, min([RHO, *(caps[name] / ranks[name] for name in linear)]))
    moved = [_to(batch, layers) for batch in batches]
    config = copy.copy(layers.config)
    config.init_lora_weights = "eva"
    per_token = all(batch.get("labels") is None or batch["labels"].dim() > 1 for batch in moved)
    config.eva_config = EvaConfig(rho=rho, use_label_mask=per_token)
    config.rank_pattern = {re.escape(layers.prefix + name): ranks[name] for name in layers}
    modes = [(module, module.training) for module in layers.model.modules()]
    try:
        layers.model.eval()
        _check_inputs(layers, moved, {name: round(ranks[name] * rho) for name in linear}, per_token)
        found = get_eva_state_dict(
            layers.model,
            moved,
            peft_config=config,
            adapter_name=layers.adapter,
            prepare_model_inputs_fn=lambda batch, _: _mask(batch, per_token),
            prepare_layer_inputs_fn=lambda x, mask, _: _rows(x, mask),
            show_progress_bar=False,
        )
    finally:
        for module, training in modes:
            module.training = training
    return {name: found[layers.prefix + name] for name in linear if layers.prefix + name in found}


def _mask(batch: Mapping[str, Any], per_token: bool) -> Tensor:
    """(n, tokens): which inputs count."""
    mask: Tensor = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
    if per_token and batch.get("labels") is not None:
        mask = mask & (batch["labels"] != -100)
    return mask


def _rows(x: Any, mask: Tensor) -> Tensor:
    """The inputs that count, (rows, d_in). A pooled input has one row per sample, and no padding."""
    inputs: Tensor = x[0] if isinstance(x, (tuple, list)) else x
    if inputs.shape[:2] == mask.shape:
        return inputs[mask]  # (n, tokens, d_in) → (rows, d_in)
    if inputs.dim() == 2 and inputs.shape[0] == mask.numel():
        return inputs[mask.reshape(-1)]  # (n · tokens, d_in) → (rows, d_in)
    return inputs.reshape(-1, inputs.shape[-1]).contiguous()  # (n, d_in); PEFT asks for contiguous ones


def _check_inputs(
    layers: AdapterLayers, batches: Sequence[Mapping[str, Any]], wanted: Mapping[str, int], per_token: bool
) -> None:
    """With too few inputs PEFT would skip the batch, and go round for ever if it skips all of them."""
    for position, batch in enumerate(batches):
        mask = _mask(batch, per_token)
        seen: dict[str, int] = {}

        def note(name: str, mask: Tensor = mask, seen: dict[str, int] = seen) -> Any:
            def hook(module: Any, inputs: Any, output: Any) -> None:
                seen[name] = len(_rows(inputs, mask))

            return hook

        handles = [layers[name].module.register_forward_hook(note(name)) for name in wanted]
        try:
            with torch.no_grad():
                layers.model(**batch)
        finally:
            for handle in handles:
                handle.remove()
        for name, count in wanted.items():
            if seen.get(name, 0) < count:
                raise ValidationBatchError(
                    f"EVA wants {count} components of the inputs of {name}, and batch {position} has only "
                    f"{seen.get(name, 0)} that count (padding and prompts do not). Give larger batches, a lower rank, "
                    "or leave the module out"
                )


def _to(batch: Mapping[str, Any], layers: AdapterLayers) -> dict[str, Any]:
    device = next(iter(layers.values())).A.device
    return {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}
