"""What leaves the process: an ordinary PEFT adapter, gates folded, complete or not there at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors import SafetensorError
from torch import nn

from lorank.errors import AdapterError
from lorank.files import WriteError, replacing_folder
from lorank.lora.io.adapter_validation import CONFIG
from lorank.lora.layer import AdapterLayers
from lorank.lora.variants.gated import folded


def fold_gates_(layers: AdapterLayers) -> None:
    """B ← B diag(g) in every gated layer, and the gates are gone: same function, plain PEFT weights."""
    for layer in layers.values():
        if layer.gate is not None:
            with torch.no_grad():
                layer.B.copy_(folded(layer.B, layer.gate))
    layers.drop_gates()


def save_adapter(layers: AdapterLayers, directory: str | Path) -> Path:
    """Saves a plain PEFT adapter that loads without lorank: same function, gates folded, no module at rank 0.

    Written beside the destination under a temporary name, brought to the disk and renamed, so that a reader never
    sees half of it, whenever the process or the machine stops (:mod:`lorank.files`). The live model keeps its gates.

    Args:
        layers: all LoRA layers of the adapter.
        directory: where to; an adapter that is there already is replaced.

    Raises:
        AdapterError: ``directory`` is a file, or holds something that is not an adapter.
        WriteError: no space, no permission; an adapter that was there before still is.
    """
    target, name = Path(directory), layers.adapter
    if target.exists() and not (target.is_dir() and (not any(target.iterdir()) or _holds_adapter(target))):
        raise AdapterError(f"{target} exists and is not an adapter's folder: name a new folder, or remove it first")
    if name in ("", ".", "..") or Path(name).name != name or "\\" in name or "\0" in name:
        raise AdapterError(f"the adapter is named {name!r}, and PEFT saves it under that name: use one without slashes")
    with replacing_folder(target) as scratch:
        try:
            layers.model.save_pretrained(str(scratch), **_only(layers))  # type: ignore[operator]  # PEFT
        except SafetensorError as error:  # which is how safetensors says that the disk is full
            raise WriteError(f"{target} cannot be written: {error}. What was complete before is still there") from error
        named = scratch / name  # where PEFT puts any adapter but the one called "default"
        if _holds_adapter(named):
            for path in named.iterdir():
                path.rename(scratch / path.name)
            named.rmdir()
    return target


def _only(layers: AdapterLayers) -> dict[str, Any]:
    """PeftModel can save one of several adapters; a transformers model with an added adapter saves the active one."""
    return {"selected_adapters": [layers.adapter]} if hasattr(layers.model, "base_model_torch_dtype") else {}


def _holds_adapter(directory: Path) -> bool:
    return (directory / CONFIG).is_file()


def make_peft_model(model: nn.Module, **lora_config: Any) -> nn.Module:
    """``get_peft_model(model, LoraConfig(**lora_config))``, for the rooms that do not know PEFT."""
    return get_peft_model(model, LoraConfig(**lora_config))  # type: ignore[no-any-return]  # PEFT is untyped
