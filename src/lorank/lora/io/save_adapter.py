"""Saves the adapter as an ordinary PEFT adapter: gates folded into B, and written atomically."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from lorank.errors import AdapterError
from lorank.files import WriteError, replacing_folder
from lorank.lora.find_layers import wrapped_model
from lorank.lora.io.adapter_validation import CONFIG
from lorank.lora.layer import AdapterLayers
from lorank.lora.variants.gated import fold_gate


def fold_gates_(layers: AdapterLayers) -> None:
    """Folds the gates into B, B ← B diag(g), and removes them: same outputs, plain PEFT weights."""
    for layer in layers.values():
        if layer.gate is not None:
            with torch.no_grad():
                layer.B.copy_(fold_gate(layer.B, layer.gate))
    layers.drop_gates()


def save_adapter(layers: AdapterLayers, directory: str | Path) -> Path:
    """Saves a plain PEFT adapter that loads without lorank: same outputs, gates folded into B, no module of rank 0.

    The folder is written under a temporary name, flushed to disk and renamed. So a reader never finds an incomplete
    adapter, even if the process or the machine stops (:mod:`lorank.files`). The live model keeps its gates.

    Args:
        layers: all LoRA layers of the adapter.
        directory: the destination. An adapter in this folder is replaced.

    Returns:
        ``directory`` as a path.

    Raises:
        AdapterError: ``directory`` is a file, or a folder that holds something else than an adapter; or the adapter's
            name is not a valid folder name.
        WriteError: no space, no permission. An adapter in this folder is unchanged.
    """
    target, name = Path(directory), layers.adapter
    if target.exists() and not (target.is_dir() and (not any(target.iterdir()) or _contains_adapter(target))):
        raise AdapterError(f"{target} exists and is not an adapter's folder: give a new folder, or remove this first")
    if name in ("", ".", "..") or Path(name).name != name or "\\" in name or "\0" in name:
        raise AdapterError(f"PEFT saves an adapter under its name, here {name!r}: use a name without slashes")
    with replacing_folder(target) as temporary:
        try:
            _save_pretrained(layers, temporary)
        except SafetensorError as error:  # safetensors raises this if the disk is full
            raise WriteError(f"{target} cannot be written: {error}. The old content is unchanged") from error
        named = temporary / name  # PEFT's subfolder for every adapter with another name than "default"
        if _contains_adapter(named):
            for path in named.iterdir():
                path.rename(temporary / path.name)
            named.rmdir()
    return target


def _save_pretrained(layers: AdapterLayers, folder: Path) -> None:
    model: Any = layers.model
    # A transformers model without this mark is the model inside a PeftModel. It would save all of its weights.
    if isinstance(getattr(model, "_orig_mod", model), PeftModel) or getattr(model, "_hf_peft_config_loaded", False):
        model.save_pretrained(str(folder), **_selected_adapter(layers))
        return
    wrapped = wrapped_model(model)
    weights = get_peft_model_state_dict(wrapped, adapter_name=layers.adapter)
    config = copy.copy(layers.config)
    config.inference_mode = True
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {f"base_model.model.{key}": value.contiguous() for key, value in weights.items()},
        folder / "adapter_model.safetensors",
        metadata={"format": "pt"},
    )
    config.save_pretrained(str(folder))


def _selected_adapter(layers: AdapterLayers) -> dict[str, Any]:
    """Arguments that select the adapter to save. A transformers model always saves its active adapter."""
    return {"selected_adapters": [layers.adapter]} if hasattr(layers.model, "base_model_torch_dtype") else {}


def _contains_adapter(directory: Path) -> bool:
    return (directory / CONFIG).is_file()


def make_peft_model(model: nn.Module, **lora_config: Any) -> nn.Module:
    """``get_peft_model(model, LoraConfig(**lora_config))``, for folders that do not import PEFT."""
    return get_peft_model(model, LoraConfig(**lora_config))  # type: ignore[no-any-return]  # PEFT is untyped
