"""Loads an adapter from a folder onto its base model, and refuses an adapter that was trained on another model."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from peft import PeftModel
from peft.utils import get_peft_model_state_dict, load_peft_weights
from torch import nn

from lorank.errors import AdapterError
from lorank.lora.experts import is_expert, is_filler
from lorank.lora.find_layers import find_layers
from lorank.lora.initialisation import check_file_can_be_loaded
from lorank.lora.io.adapter_folder import readable_folder
from lorank.lora.io.adapter_validation import CONFIG, check_weights, read_config
from lorank.lora.resize import resize_
from lorank.lora.resize_plan import LayerPlan

UNTRUE = r"The following (rank|alpha)_pattern keys did not match"
"""PEFT's warning about parameters. It looks for their names among modules only, but uses the entries all the same."""


def read_adapter_config(folder: str | Path) -> dict[str, Any]:
    """Reads the settings of a plain PEFT LoRA adapter.

    Raises:
        AdapterError: the folder does not exist, holds no adapter (a merged model has none), or an adapter other than
            LoRA.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise AdapterError(f"{folder}: there is no such folder. Give the folder of an adapter, which contains {CONFIG}")
    path = readable_folder(folder) / CONFIG
    if not path.is_file():
        merged = (folder / "config.json").is_file()
        why = "is a whole model; if an adapter was merged into it, its ranks are lost" if merged else "has no " + CONFIG
        raise AdapterError(f"{folder} {why}. Give the folder that model.save_pretrained of the PEFT model wrote")
    return read_config(path)


def load_adapter(base: nn.Module, folder: str | Path) -> nn.Module:
    """Loads the adapter in ``folder`` onto ``base`` and returns the PEFT model, frozen and in evaluation mode.

    Args:
        base: the model that the adapter was trained on; it is changed in place.
        folder: a folder that ``save_pretrained`` of a PEFT model wrote; it is not changed. If :func:`save_adapter` was
            interrupted in it, the new adapter is read (:mod:`lorank.lora.io.adapter_folder`).

    Raises:
        AdapterError: the folder holds no LoRA adapter, its weights cannot be read, its modules or shapes do not fit
            ``base``, or PEFT cannot repeat its initialisation (CorDA, LoRA-GA).
    """
    folder = readable_folder(Path(folder))
    config = read_adapter_config(folder)
    does_not_fit = (
        f"The adapter in {folder} does not fit this model. It was trained on "
        f"{config.get('base_model_name_or_path')!r}; load it onto that model"
    )
    check_weights(folder, config)
    check_file_can_be_loaded(config.get("init_lora_weights"))
    try:
        saved = load_peft_weights(str(folder), device="cpu")
        with warnings.catch_warnings():
            if config.get("target_parameters"):
                warnings.filterwarnings("ignore", UNTRUE, RuntimeWarning)
            model = PeftModel.from_pretrained(base, str(folder))
    except Exception as error:  # settings that are valid one by one may be invalid together, with any error in PEFT
        raise AdapterError(f"{does_not_fit}. {_first_line(error)}") from error
    live = get_peft_model_state_dict(model, save_embedding_layers=False)
    # PEFT loads the weights that fit and ignores the others, with a warning at most.
    differing = sorted(key for key in saved.keys() ^ live.keys() if "lora_" in key)
    if differing:
        where = "file" if differing[0] in saved else "model"
        raise AdapterError(f"{does_not_fit}. {len(differing)} weights differ; {differing[0]} is only in the {where}")
    remove_fillers_(model)
    return model.eval()  # type: ignore[no-any-return]  # PEFT is untyped


def remove_fillers_(model: nn.Module) -> None:
    """Gives the parameters whose rank in the file is a rank of zeros the rank 0 that it stands for."""
    if not any(is_expert(module) for module in model.modules()):
        return
    layers = find_layers(model)
    fillers = [
        name for name, one in layers.items() if one.is_expert and is_filler(one.layout.experts, one.A.data, one.B.data)
    ]
    if len(fillers) < len(layers):
        resize_(layers, {name: LayerPlan(()) for name in fillers})


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # The first line of PyTorch's message only says that an error occurred; the second line names the error.
    return " ".join(lines[:2])[:300] if lines else type(error).__name__
