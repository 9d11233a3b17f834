"""EVA (Paischer et al., arXiv 2410.07170), computed by PEFT: A is set to principal components of a module's inputs.

PEFT computes, per module, the principal components of the module's inputs over batches. It gives ranks to the
components that explain most of their module's variance. PEFT's ``initialize_lora_eva_weights`` requires an adapter
made with ``init_lora_weights="eva"``. This file calls the function behind it, ``get_eva_state_dict``, which takes any
configuration and so works with an ordinary adapter.
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
from torch import Tensor, nn

from lorank.errors import AdapterError, ValidationBatchError
from lorank.lora.layer import AdapterLayers

RHO = 2.0
"""PEFT's default for ρ: a module receives at most twice its initial ranks."""


def eva_components(
    layers: AdapterLayers,
    batches: Sequence[Mapping[str, Any]],
    ranks: Mapping[str, int],
    caps: Mapping[str, int],
    model: nn.Module | None = None,
) -> dict[str, Tensor]:
    """Computes EVA's initial A of every module. The total of the ranks is that of ``ranks``; the model is unchanged.

    Args:
        layers: all LoRA layers. Embeddings and parameters (of experts) are left out, because EVA does not support them.
        batches: arguments of the model's forward. Padding (attention_mask) and prompts (labels −100) are ignored.
            PEFT repeats the batches until the components have converged.
        ranks: per module, its rank before EVA redistributes the ranks. ≥ 1, because PEFT fails at rank 0.
        caps: per module, its maximum rank. EVA's ρ, the factor by which a module may grow, is 2, or less if the
            smallest ratio of cap to rank is below 2.
        model: the model that takes the batches, if it is a larger model around ``layers.model``.

    Returns:
        Per module (rank, d_in), most important component first; (0, d_in) for a module that receives no rank.

    Raises:
        AdapterError: the model is not a PeftModel.
        ValidationBatchError: there is no batch, or a batch has fewer inputs to a module than components are needed.
    """
    outer = layers.model if model is None else model
    if not isinstance(layers.model, PeftModel):
        raise AdapterError(
            f"EVA needs a PeftModel, got a {type(layers.model).__name__} with an adapter added to it: make the model "
            "with get_peft_model"
        )
    if not batches:
        raise ValidationBatchError("there is no batch to compute EVA on: give at least one")
    linear = {
        name: layer
        for name, layer in layers.items()
        if not (layer.is_embedding or layer.is_convolution or layer.is_expert)
    }
    if not linear:
        return {}
    rho = max(1.0, min([RHO, *(caps[name] / ranks[name] for name in linear)]))
    batches_on_device = [_to_device(batch, layers) for batch in batches]
    config = copy.copy(layers.config)
    config.init_lora_weights = "eva"
    per_token = all(batch.get("labels") is None or batch["labels"].dim() > 1 for batch in batches_on_device)
    config.eva_config = EvaConfig(rho=rho, use_label_mask=per_token)
    config.rank_pattern = {re.escape(layers.prefix + name): ranks[name] for name in layers}
    modes = [(module, module.training) for module in outer.modules()]
    try:
        outer.eval()
        _check_inputs(outer, layers, batches_on_device, {name: round(ranks[name] * rho) for name in linear}, per_token)
        found = get_eva_state_dict(
            layers.model,
            batches_on_device,
            peft_config=config,
            adapter_name=layers.adapter,
            forward_fn=lambda _, batch: outer(**batch),
            prepare_model_inputs_fn=lambda batch, _: _counted_mask(batch, per_token),
            prepare_layer_inputs_fn=lambda x, mask, _: _counted_rows(x, mask),
            show_progress_bar=False,
        )
    finally:
        for module, training in modes:
            module.training = training
    return {name: found[layers.prefix + name] for name in linear if layers.prefix + name in found}


def _counted_mask(batch: Mapping[str, Any], per_token: bool) -> Tensor:
    """(n, tokens) bool: true for inputs that are neither padding nor prompt."""
    if "attention_mask" not in batch and "input_ids" not in batch:  # images: every input counts
        images = next(value for value in batch.values() if isinstance(value, Tensor))
        return torch.ones(len(images), 1, dtype=torch.bool, device=images.device)
    mask: Tensor = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
    if per_token and batch.get("labels") is not None:
        mask = mask & (batch["labels"] != -100)
    return mask


def _counted_rows(x: Any, mask: Tensor) -> Tensor:
    """The inputs selected by ``mask``, (rows, d_in). A pooled input has one row per sample and no padding."""
    inputs: Tensor = x[0] if isinstance(x, (tuple, list)) else x
    if inputs.shape[:2] == mask.shape:
        return inputs[mask]  # (n, tokens, d_in) → (rows, d_in)
    if inputs.dim() == 2 and inputs.shape[0] == mask.numel():
        return inputs[mask.reshape(-1)]  # (n · tokens, d_in) → (rows, d_in)
    return inputs.reshape(-1, inputs.shape[-1]).contiguous()  # (n, d_in); PEFT needs contiguous inputs


def _check_inputs(
    model: nn.Module,
    layers: AdapterLayers,
    batches: Sequence[Mapping[str, Any]],
    wanted: Mapping[str, int],
    per_token: bool,
) -> None:
    """Raises ValidationBatchError for a batch with too few inputs.

    PEFT would skip such a batch, and would loop forever if it skips every batch.
    """
    for position, batch in enumerate(batches):
        mask = _counted_mask(batch, per_token)
        row_counts: dict[str, int] = {}

        def make_hook(name: str, mask: Tensor = mask, row_counts: dict[str, int] = row_counts) -> Any:
            def hook(module: Any, inputs: Any, output: Any) -> None:
                row_counts[name] = len(_counted_rows(inputs, mask))

            return hook

        handles = [layers[name].module.register_forward_hook(make_hook(name)) for name in wanted]
        try:
            with torch.no_grad():
                model(**batch)
        finally:
            for handle in handles:
                handle.remove()
        for name, count in wanted.items():
            if row_counts.get(name, 0) < count:
                raise ValidationBatchError(
                    f"EVA needs {count} inputs of {name} for as many components, and batch {position} has only "
                    f"{row_counts.get(name, 0)} without padding and prompts. Give larger batches, use a lower rank, or "
                    "leave the module out"
                )


def _to_device(batch: Mapping[str, Any], layers: AdapterLayers) -> dict[str, Any]:
    device = next(iter(layers.values())).A.device
    return {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}
