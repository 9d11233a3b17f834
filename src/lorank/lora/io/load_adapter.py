"""An adapter from a folder onto its base model, whoever trained it, and only if the two belong together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft import PeftModel
from peft.utils import get_peft_model_state_dict, load_peft_weights
from torch import nn

from lorank.errors import AdapterError
from lorank.lora.io.adapter_validation import CONFIG, check_weights, read_config


def read_adapter_config(folder: str | Path) -> dict[str, Any]:
    """The settings of a plain PEFT LoRA adapter.

    Raises:
        AdapterError: the folder is not there, holds no adapter (a merged model has none), or one of another kind.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise AdapterError(f"{folder}: there is no such folder. Name the folder of an adapter ({CONFIG} is in it)")
    path = folder / CONFIG
    if not path.is_file():
        merged = (folder / "config.json").is_file()
        why = "is a whole model; if an adapter was merged into it, its ranks are gone" if merged else "has no " + CONFIG
        raise AdapterError(f"{folder} {why}. Name the folder that model.save_pretrained of the PEFT model wrote")
    return read_config(path)


def load_adapter(base: nn.Module, folder: str | Path) -> nn.Module:
    """``base`` with the adapter in ``folder``, frozen, in evaluation mode.

    Args:
        base: the model that the adapter was trained on; changed in place.
        folder: what ``save_pretrained`` of a PEFT model wrote; left as it is.

    Raises:
        AdapterError: the folder holds no LoRA adapter, its weights cannot be read, or they belong to another model:
            modules or shapes differ.
    """
    config = read_adapter_config(folder)
    other = (
        f"The adapter in {folder} does not fit this model. It was trained on "
        f"{config.get('base_model_name_or_path')!r}; give that model"
    )
    check_weights(Path(folder), config)
    try:
        saved = load_peft_weights(str(folder), device="cpu")
        model = PeftModel.from_pretrained(base, str(folder))
    except Exception as error:  # whatever PEFT makes of settings that are right one by one and not together
        raise AdapterError(f"{other}. {_first_line(error)}") from error
    live = get_peft_model_state_dict(model, save_embedding_layers=False)
    # PEFT loads what fits and leaves out the rest, with a warning at most
    differing = sorted(key for key in saved.keys() ^ live.keys() if "lora_" in key)
    if differing:
        where = "file" if differing[0] in saved else "model"
        raise AdapterError(f"{other}. {len(differing)} weights differ; {differing[0]} is only in the {where}")
    return model.eval()  # type: ignore[no-any-return]  # PEFT is untyped


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # PyTorch's first line only says that something went wrong; the second one says what
    return " ".join(lines[:2])[:300] if lines else type(error).__name__
