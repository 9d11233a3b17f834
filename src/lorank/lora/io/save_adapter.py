"""Saves the adapter as an ordinary PEFT adapter: gates folded into B, with the folder's other files untouched."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import save_file

from lorank.errors import AdapterError
from lorank.files import WriteError, is_leftover
from lorank.lora.find_layers import wrapped_model
from lorank.lora.io.adapter_folder import contains_adapter, replacing_adapter
from lorank.lora.io.model_card import write_card
from lorank.lora.layer import AdapterLayers
from lorank.lora.variants.gated import fold_gate


def fold_gates_(layers: AdapterLayers) -> None:
    """Folds the gates into B, B ← B diag(g), and removes them: same outputs, plain PEFT weights.

    A run does this when it is finished. Until then its method needs the gates, and saving and merging include them.
    """
    for layer in layers.values():
        if layer.gate is not None:
            with torch.no_grad():
                layer.B.copy_(fold_gate(layer.B, layer.gate, layer.layout))
    layers.drop_gates()


def save_adapter(layers: AdapterLayers, directory: str | Path, about: Mapping[str, str] | None = None) -> Path:
    """Saves a plain PEFT adapter that loads without lorank: same outputs, gates folded into B, no module of rank 0.

    Only the files of an adapter are replaced; whatever else the folder holds is never touched. If the process or the
    machine stops at any moment, no reader loads a mixture of two adapters (:mod:`lorank.lora.io.adapter_folder`):

    - A new folder, or one that holds nothing but an adapter: it is written under a temporary name, flushed to disk and
      renamed, so it always holds a complete adapter, the old one or the new one.
    - A folder that also holds other files: the adapter's files are replaced one by one, and ``adapter_config.json`` is
      missing meanwhile. After an interruption there, PEFT refuses the folder, lorank reads the complete new adapter
      from it, and the next save into it completes the interrupted one.

    The adapter gets a model card, ``README.md``, with its ranks. A ``README.md`` in the folder is kept: only the lines
    between lorank's own marks in it are written anew. The live model keeps its gates.

    Args:
        layers: all LoRA layers of the adapter.
        directory: the destination. An adapter in this folder is replaced.
        about: further lines of the card's first table, label → text, for example ``{"Data": "e2e_nlg"}``.

    Returns:
        ``directory`` as a path.

    Raises:
        AdapterError: ``directory`` is a file, or a folder that holds other files and no adapter; or the adapter's name
            is not a valid folder name.
        WriteError: no space, no permission. An adapter in this folder is unchanged.
    """
    target, name = Path(directory), layers.adapter
    check_save_directory(target)
    if name in ("", ".", "..") or Path(name).name != name or "\\" in name or "\0" in name:
        raise AdapterError(f"PEFT saves an adapter under its name, here {name!r}: use a name without slashes")
    with replacing_adapter(target) as temporary:
        try:
            _save_pretrained(layers, temporary)
        except SafetensorError as error:  # safetensors raises this if the disk is full
            raise WriteError(f"{target} cannot be written: {error}. The old content is unchanged") from error
        named = temporary / name  # PEFT's subfolder for every adapter with another name than "default"
        if contains_adapter(named):
            for path in named.iterdir():
                path.rename(temporary / path.name)
            named.rmdir()
        write_card(temporary, layers, about)
    return target


def check_save_directory(directory: Path) -> None:
    """Checks that :func:`save_adapter` accepts a folder.

    Raises:
        AdapterError: ``directory`` is a file, or a folder that holds other files and no adapter.
    """
    if not directory.exists():
        return
    if not directory.is_dir() or not (contains_adapter(directory) or all(map(is_leftover, directory.iterdir()))):
        raise AdapterError(
            f"{directory} exists and is not an adapter's folder: give a new folder, or one with an adapter"
        )


def _save_pretrained(layers: AdapterLayers, folder: Path) -> None:
    model: Any = layers.model
    # A transformers model without this mark is the model inside a PeftModel. It would save all of its weights.
    if isinstance(getattr(model, "_orig_mod", model), PeftModel) or getattr(model, "_hf_peft_config_loaded", False):
        model.save_pretrained(str(folder), **_selected_adapter(layers), **_without_embeddings(model))
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


def _without_embeddings(model: Any) -> dict[str, Any]:
    """Arguments for a model without input embeddings, such as wav2vec2.

    PEFT asks every model for them whose adapter has an ``lm_head``, and fails.
    """
    if not isinstance(getattr(model, "_orig_mod", model), PeftModel):
        return {}
    try:
        model.get_input_embeddings()
    except NotImplementedError:
        return {"save_embedding_layers": False}
    except AttributeError:  # no transformers model; PEFT does not ask it
        pass
    return {}
