"""An adapter's file without its base model: enough to change ranks, where no forward pass is needed.

The LoRA of a file is put on a skeleton: modules with the names in the file and the shapes of its weights, whose own
weights are one zero, repeated without memory. There, PEFT reads the settings and the weights as it does on the real
model, and :func:`lorank.lora.resize_` works as everywhere. All other tensors of the file (heads, saved modules, biases,
embeddings with new tokens) and all other settings are carried over as they are.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lorank.errors import AdapterError
from lorank.lora.find_layers import find_layers
from lorank.lora.initialisation import INIT_FIELDS, check_file_can_shrink, set_plain_init_
from lorank.lora.io.adapter_folder import readable_folder, replacing_adapter
from lorank.lora.io.adapter_validation import CONFIG, WEIGHTS, check_weights
from lorank.lora.io.architecture import architecture_of
from lorank.lora.io.load_adapter import UNTRUE, read_adapter_config, remove_fillers_
from lorank.lora.io.model_card import write_card
from lorank.lora.io.save_adapter import check_save_directory
from lorank.lora.layer import TARGET_FIELDS, AdapterLayers
from lorank.lora.rank_zero import stated_entries

CONVOLUTIONS: Mapping[int, Any] = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}
"""By the number of axes of a weight."""
_PREFIX = "base_model.model."
_RANK_FIELDS = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", *INIT_FIELDS)


@dataclass(frozen=True)
class StandaloneAdapter:
    """An adapter that was read without its base model.

    Attributes:
        folder: where it was read from.
        layers: its LoRA layers, on a model without weights that cannot be run.
        config: its settings as they are in the file.
        others: the tensors of the file that are no LoRA, by their keys.
    """

    folder: Path
    layers: AdapterLayers
    config: LoraConfig
    others: Mapping[str, Tensor]


def open_standalone(folder: str | Path) -> StandaloneAdapter:
    """Reads a plain PEFT LoRA adapter without its base model.

    Raises:
        AdapterError: the folder holds no LoRA adapter, or its weights cannot be read or do not fit its settings; its
            initialisation changed the base weights; it adapts convolutions or tied modules, which need the model; or
            it adapts parameters, and the configuration of its base model cannot be read.
    """
    folder = readable_folder(Path(folder))
    settings = read_adapter_config(folder)
    check_weights(folder, settings)
    check_file_can_shrink(settings.get("init_lora_weights"))
    config = LoraConfig.from_pretrained(str(folder))
    if getattr(config, "ensure_weight_tying", None):
        raise AdapterError(
            f"the adapter in {folder} has ensure_weight_tying, which cannot be understood without its base model: load "
            "it onto the model, and use lorank.resize_adapter_(model, …)"
        )
    tensors = load_file(folder / WEIGHTS)
    lora = {key: value for key, value in tensors.items() if "lora_" in key}
    names = list(dict.fromkeys(key.removeprefix(_PREFIX).partition(".lora_")[0] for key in lora))
    if not names or not all(key.startswith(_PREFIX) for key in lora):
        raise AdapterError(f"{folder / WEIGHTS} holds no LoRA weights under PEFT's names ({_PREFIX}….lora_A.weight)")
    bare = _bare(config, names)
    if config.target_parameters:
        skeleton = architecture_of(config.base_model_name_or_path, config.task_type, next(iter(lora.values())).dtype)
        bare.target_modules, bare.layers_to_transform = config.target_modules, config.layers_to_transform
        bare.layers_pattern = config.layers_pattern
    else:
        skeleton = nn.Module()
        for name in names:
            _place(skeleton, name, _empty_module(name, tensors, folder))
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", UNTRUE, RuntimeWarning)
            model = get_peft_model(skeleton, bare, low_cpu_mem_usage=True, autocast_adapter_dtype=False)
        result = set_peft_model_state_dict(model, lora, low_cpu_mem_usage=True)
    except Exception as error:  # settings that are valid one by one may be invalid together, with any error in PEFT
        raise AdapterError(
            f"the weights and the settings in {folder} do not fit each other: {str(error).strip()[:300]}"
        ) from error
    layers = find_layers(model)
    missing = [name for name, layer in layers.items() if layer.A.is_meta or layer.B.is_meta]
    if missing or result.unexpected_keys:
        raise AdapterError(
            f"the weights in {folder} are not complete: {(missing or result.unexpected_keys)[0]} has no counterpart. "
            "Save the adapter again"
        )
    remove_fillers_(model)
    layers = find_layers(model)
    return StandaloneAdapter(folder, layers, config, {key: value for key, value in tensors.items() if key not in lora})


def save_standalone(adapter: StandaloneAdapter, directory: str | Path) -> Path:
    """Saves an adapter with its present ranks, as :func:`lorank.lora.save_adapter` does, and with all it carries.

    Returns:
        ``directory`` as a path.

    Raises:
        AdapterError: ``directory`` is a file, or a folder that holds other files and no adapter.
        WriteError: no space, no permission. An adapter in this folder is unchanged.
    """
    target, layers = Path(directory), adapter.layers
    check_save_directory(target)
    empty = [name for name, rank in layers.ranks.items() if not rank]
    weights = get_peft_model_state_dict(layers.model, adapter_name=layers.adapter, save_embedding_layers=False)
    tensors = {key: value.contiguous() for key, value in weights.items() if "lora_" in key}
    tensors.update({_without_lora(key, empty): value for key, value in adapter.others.items()})
    config = copy.copy(adapter.config)
    for field in _RANK_FIELDS:
        setattr(config, field, getattr(layers.config, field))
    if empty:
        for field in TARGET_FIELDS:
            setattr(config, field, getattr(layers.config, field))
        config.target_modules = stated_entries(layers.config.target_modules, adapter.config.target_modules)
    config.inference_mode = True
    with replacing_adapter(target) as temporary:
        temporary.mkdir(parents=True, exist_ok=True)
        save_file(tensors, temporary / WEIGHTS, metadata={"format": "pt"})
        config.save_pretrained(str(temporary))
        assert (temporary / CONFIG).is_file()
        write_card(temporary, layers, base=adapter.config.base_model_name_or_path)
    return target


def _empty_module(name: str, tensors: Mapping[str, Tensor], folder: Path) -> nn.Module:
    """A module without weights, of the shape that the LoRA in the file has."""
    key = f"{_PREFIX}{name}."
    A, B = tensors.get(f"{key}lora_embedding_A"), tensors.get(f"{key}lora_embedding_B")
    if A is not None and B is not None and A.dim() == B.dim() == 2:
        module: nn.Module = nn.Embedding(A.shape[1], B.shape[0], device="meta")
        module.weight = _zeros(A.shape[1], B.shape[0], dtype=A.dtype)
        return module
    A, B = tensors.get(f"{key}lora_A.weight"), tensors.get(f"{key}lora_B.weight")
    is_convolution = A is not None and B is not None and A.dim() == B.dim() in CONVOLUTIONS
    if A is None or B is None or not (is_convolution or A.dim() == B.dim() == 2):
        what = "no pair of lora_A and lora_B" if A is None or B is None else f"lora_A of shape {tuple(A.shape)}"
        raise AdapterError(
            f"{name} in {folder} has {what}: without the base model, lorank reads the LoRA of linear maps, "
            "convolutions and embeddings only"
        )
    if is_convolution:
        module = _empty_convolution(name, A, B, folder)
    else:
        module = nn.Linear(A.shape[1], B.shape[0], bias=False, device="meta")
        module.weight = _zeros(B.shape[0], A.shape[1], dtype=A.dtype)
    if any(end in tensors for end in (f"{key}base_layer.bias", f"{key}lora_B.bias")):
        module.bias = _zeros(B.shape[0], dtype=A.dtype)
    return module


def _empty_convolution(name: str, A: Tensor, B: Tensor, folder: Path) -> nn.Module:
    """A convolution of A's kernel. Its stride and padding are not known, and change no weight."""
    groups, left = divmod(A.shape[0], B.shape[1]) if A.numel() and B.numel() else (0, 1)
    if left or not groups or A.shape[1] % groups or B.shape[0] % groups:
        raise AdapterError(
            f"{name} in {folder} has lora_A of shape {tuple(A.shape)} and lora_B of shape {tuple(B.shape)}, which are "
            "no LoRA of a convolution. Save the adapter again"
        )
    kind = CONVOLUTIONS[A.dim()]
    module: nn.Module = kind(A.shape[1], B.shape[0], tuple(A.shape[2:]), groups=groups, bias=False, device="meta")
    module.weight = _zeros(B.shape[0], A.shape[1] // groups, *A.shape[2:], dtype=A.dtype)
    return module


def _zeros(*shape: int, dtype: torch.dtype) -> nn.Parameter:
    """PEFT moves the LoRA to the device and the dtype of the base weight, so it cannot be on the meta device."""
    return nn.Parameter(torch.zeros((), dtype=dtype).expand(*shape), requires_grad=False)


def _place(root: nn.Module, name: str, module: nn.Module) -> None:
    *path, last = name.split(".")
    for part in path:
        if part not in root._modules:
            root.add_module(part, nn.Module())
        root = root._modules[part]  # type: ignore[assignment]  # added above
    root.add_module(last, module)


def _bare(config: LoraConfig, names: Iterable[str]) -> LoraConfig:
    """The settings for the skeleton: those of its LoRA modules, and nothing of the rest of the model."""
    bare = copy.copy(config)
    bare.task_type = bare.modules_to_save = bare.exclude_modules = None
    bare.trainable_token_indices = bare.base_model_name_or_path = None
    bare.layers_to_transform = bare.layers_pattern = None
    bare.target_modules = set(names)
    bare.fan_in_fan_out = False  # of the base weights, which are not there
    bare.inference_mode = False
    set_plain_init_(bare)
    return bare


def _without_lora(key: str, empty: Iterable[str]) -> str:
    """The key of a tensor beside the LoRA. PEFT's wrapper is no part of it where no LoRA is left."""
    for name in empty:
        key = key.replace(f"{_PREFIX}{name}.base_layer.", f"{_PREFIX}{name}.")
    return key
