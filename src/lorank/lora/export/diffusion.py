"""LoRAs of image models: the keys of diffusers, and those of kohya's scripts, which ComfyUI and others read.

    diffusers    unet.down_blocks.0.….to_q.lora_A.weight     s is in B; ranks and alphas = ranks in the file's metadata
    comfyui      lora_unet_down_blocks_0_…_to_q.lora_down.weight, …lora_up.weight, …alpha = 1, and s r is in B

diffusers takes the settings of PEFT from the metadata (since 0.34). Without them it gives each module alpha = rank,
which is s = 1, as it is here. ComfyUI divides each module's alpha by its rank, and takes s = 1 where there is no alpha.
There is one alpha for all modules: diffusers, which reads these keys too, loses alphas of attention if they differ.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from lorank.errors import AdapterError
from lorank.lora.export.adapter_file import AdapterFile
from lorank.lora.export.comparison import Factors
from lorank.lora.export.peft_forms import check_plain, fold

FILE = "pytorch_lora_weights.safetensors"
"""The file that diffusers looks for in a folder."""
COMPONENTS = ("unet", "transformer", "text_encoder", "text_encoder_2")
"""The parts of a pipeline that have LoRAs."""
_KOHYA = {
    "unet": "lora_unet",
    "transformer": "lora_transformer",
    "text_encoder": "lora_te1",
    "text_encoder_2": "lora_te2",
}
_METADATA = "lora_adapter_metadata"


def component_of(adapter: AdapterFile, component: str | None = None) -> str:
    """The part of a pipeline that the adapter belongs to, by the names of its modules.

    Args:
        component: one of :data:`COMPONENTS`; None: from the names.

    Raises:
        AdapterError: the names are those of none of them, or ``component`` is none of them.
    """
    if component is not None:
        if component not in COMPONENTS:
            raise AdapterError(f"component {component!r}: expected one of {', '.join(COMPONENTS)}")
        return component
    names = list(adapter.updates)
    if any(part in name for name in names for part in ("down_blocks.", "mid_block.", "up_blocks.")):
        return "unet"
    if any("transformer_blocks." in name for name in names):
        return "transformer"
    if any(
        name.startswith(("text_model.encoder.layers.", "encoder.layers.")) and ".self_attn." in name for name in names
    ):
        return "text_encoder"
    raise AdapterError(
        f"the adapter's modules ({names[0]}, …) are those of no image model that is known here. If the adapter belongs "
        f"to one, name the part of the pipeline: --component {', '.join(COMPONENTS[:-1])} or {COMPONENTS[-1]}"
    )


def write_diffusers(adapter: AdapterFile, folder: Path, component: str, dtype: torch.dtype | None) -> tuple[str, ...]:
    """Writes the form ``diffusers``, as ``save_lora_weights`` of a pipeline does. Returns notes for the user."""
    check_diffusion(adapter, "diffusers")
    folded, notes = fold(adapter, {name: one.scaling for name, one in adapter.updates.items()}, dtype)
    tensors, ranks = {}, {f"^{name}": one.rank for name, one in folded.items()}
    for name, one in folded.items():
        tensors[f"{component}.{name}.lora_A.weight"] = one.A.contiguous()
        tensors[f"{component}.{name}.lora_B.weight"] = one.B.contiguous()
    rank = next(iter(ranks.values()))
    settings = {
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": ranks,
        "alpha_pattern": ranks,
        "target_modules": list(folded),
    }
    packed = {f"{component}.{key}": value for key, value in settings.items()}
    save_file(tensors, folder / FILE, metadata={"format": "pt", _METADATA: json.dumps(packed, sort_keys=True)})
    return notes


def write_comfyui(adapter: AdapterFile, folder: Path, component: str, dtype: torch.dtype | None) -> tuple[str, ...]:
    """Writes the form ``comfyui``. Returns notes for the user."""
    check_diffusion(adapter, "comfyui")
    folded, notes = fold(adapter, {name: one.scaling * one.rank for name, one in adapter.updates.items()}, dtype)
    tensors = {}
    for name, one in folded.items():
        key = _kohya_key(component, name)
        tensors[f"{key}.lora_down.weight"] = one.A.contiguous()
        tensors[f"{key}.lora_up.weight"] = one.B.contiguous()
        tensors[f"{key}.alpha"] = torch.tensor(1.0)
    save_file(tensors, folder / FILE, metadata={"format": "pt"})
    return notes


def read_diffusers(adapter: AdapterFile, folder: Path, component: str) -> dict[str, Factors]:
    """What diffusers makes of the file: s · B and A of every module, by the settings in the file's metadata."""
    with safe_open(folder / FILE, framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  # not a dict
        packed = json.loads(file.metadata()[_METADATA])
    ranks, alphas = packed[f"{component}.rank_pattern"], packed[f"{component}.alpha_pattern"]
    found = {}
    for key, A in tensors.items():
        if key.endswith(".lora_A.weight"):
            name = key.removeprefix(f"{component}.").removesuffix(".lora_A.weight")
            scaling = alphas[f"^{name}"] / ranks[f"^{name}"]
            found[name] = _factors(tensors[key.replace("lora_A", "lora_B")], A, scaling)
    return found


def read_comfyui(adapter: AdapterFile, folder: Path, component: str) -> dict[str, Factors]:
    """What ComfyUI makes of the file: it looks for the keys of the model's modules."""
    with safe_open(folder / FILE, framework="pt") as file:
        tensors: Mapping[str, Tensor] = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    found = {}
    for name in adapter.updates:
        key = _kohya_key(component, name)
        A = tensors[f"{key}.lora_down.weight"]
        found[name] = _factors(tensors[f"{key}.lora_up.weight"], A, float(tensors[f"{key}.alpha"]) / len(A))
    return found


def _factors(B: Tensor, A: Tensor, scaling: float) -> Factors:
    return scaling * B.double().flatten(1), A.double().flatten(1)


def _kohya_key(component: str, name: str) -> str:
    if component.startswith("text_encoder") and not name.startswith("text_model."):
        name = f"text_model.{name}"  # newer versions of transformers have no such part, and ComfyUI expects it
    return f"{_KOHYA[component]}_{name.replace('.', '_')}"


def check_diffusion(adapter: AdapterFile, form: str) -> None:
    """Raises AdapterError if the adapter holds more than LoRAs of linear maps and convolutions."""
    check_plain(adapter, form)
    embedding = next((name for name, one in adapter.updates.items() if one.is_embedding), None)
    if embedding is not None:
        raise AdapterError(f"{embedding} is an embedding, which the form {form!r} has no key for: use --form peft")
