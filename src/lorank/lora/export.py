"""What leaves the process: an ordinary PEFT adapter, gates folded, complete or not there at all."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from lorank.errors import AdapterError
from lorank.lora.gated import folded
from lorank.lora.layer import AdapterLayers


def fold_gates_(layers: AdapterLayers) -> None:
    """B ← B diag(g) in every gated layer, and the gates are gone: same function, plain PEFT weights."""
    for layer in layers.values():
        if layer.gate is not None:
            with torch.no_grad():
                layer.B.copy_(folded(layer.B, layer.gate))
    layers.drop_gates()


def save_adapter(layers: AdapterLayers, directory: str | Path) -> Path:
    """Saves a plain PEFT adapter that loads without lorank: same function, gates folded, no module at rank 0.

    Written beside the destination under a temporary name and renamed, so that a reader never sees half of it. The live
    model keeps its gates.

    Args:
        layers: all LoRA layers of the adapter.
        directory: where to; an adapter that is there already is replaced.

    Raises:
        AdapterError: ``directory`` is a file, or holds something that is not an adapter.
    """
    target = Path(directory)
    if target.exists() and not (target.is_dir() and (not any(target.iterdir()) or _holds_adapter(target))):
        raise AdapterError(f"{target} exists and is not an adapter's folder: name a new folder, or remove it first")
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        layers.model.save_pretrained(str(scratch / "new"), **_only(layers))  # type: ignore[operator]  # PEFT
        named = scratch / "new" / layers.adapter  # where PEFT puts any adapter but the one called "default"
        if target.exists():
            target.rename(scratch / "old")
        (named if _holds_adapter(named) else scratch / "new").rename(target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target


def _only(layers: AdapterLayers) -> dict[str, Any]:
    """PeftModel can save one of several adapters; a transformers model with an added adapter saves the active one."""
    return {"selected_adapters": [layers.adapter]} if hasattr(layers.model, "base_model_torch_dtype") else {}


def _holds_adapter(directory: Path) -> bool:
    return (directory / "adapter_config.json").is_file()


def wrap(model: nn.Module, **lora_config: Any) -> nn.Module:
    """``get_peft_model(model, LoraConfig(**lora_config))``, for the rooms that do not know PEFT."""
    return get_peft_model(model, LoraConfig(**lora_config))  # type: ignore[no-any-return]  # PEFT is untyped
