"""An adapter as a GGUF file, for llama.cpp and what is built on it.

llama.cpp computes the factor of a module as alpha / r, with one alpha and the rank of the tensor itself. The file has
alpha = 1, and B' = s r B (the form ``tight``). Names of tensors come from the ``gguf`` package. llama.cpp rotates
neighbouring pairs of a head's numbers where Llama in transformers rotates halves, so the base model's conversion
reorders the rows of q and k in some architectures; B is reordered in the same way here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorank.errors import AdapterError
from lorank.extras import require
from lorank.lora.export.adapter_file import AdapterFile, Update
from lorank.lora.export.comparison import Factors
from lorank.lora.export.peft_forms import check_plain, fold

FILE = "adapter.gguf"
ALPHA = 1.0


@dataclass(frozen=True)
class Architecture:
    """How llama.cpp names and lays out a family of models.

    Attributes:
        name: the name of the architecture in the file.
        reorders: whether the rows of q and k are reordered.
        tensors: the member of ``gguf.MODEL_ARCH``.
    """

    name: str
    tensors: str
    reorders: bool = False


# By model_type of the base model. Only families whose weights llama.cpp's conversion takes as they are, or with the
# rows of q and k reordered: benchmarks/servers/llama_cpp.py compares each of them with that conversion.
ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": Architecture("llama", "LLAMA", reorders=True),
    "mistral": Architecture("llama", "LLAMA", reorders=True),
    "smollm3": Architecture("smollm3", "SMOLLM3", reorders=True),
    "granite": Architecture("granite", "GRANITE", reorders=True),
    "qwen2": Architecture("qwen2", "QWEN2"),
    "qwen3": Architecture("qwen3", "QWEN3"),
    "gemma": Architecture("gemma", "GEMMA"),
    "gemma2": Architecture("gemma2", "GEMMA2"),
    "gemma3_text": Architecture("gemma3", "GEMMA3"),
    "phi": Architecture("phi2", "PHI2"),
    "phi3": Architecture("phi3", "PHI3"),
    "olmo2": Architecture("olmo2", "OLMO2"),
    "starcoder2": Architecture("starcoder2", "STARCODER2"),
    "stablelm": Architecture("stablelm", "STABLELM"),
}


def check_architecture(config: Any | None, adapter: AdapterFile) -> Architecture:
    """The architecture of the base model.

    Raises:
        AdapterError: its configuration is not known, or llama.cpp's layout of it is not known here.
    """
    if config is None:
        raise AdapterError(
            "the form 'gguf' needs the configuration of the base model, for the names and the layout of its tensors, "
            f"and {adapter.config.base_model_name_or_path!r} has none that can be read: give --base (a folder with "
            "config.json, or a hub name)"
        )
    found = ARCHITECTURES.get(config.model_type)
    if found is None:
        raise AdapterError(
            f"the form 'gguf' knows {', '.join(ARCHITECTURES)}, and the base model is {config.model_type!r}. Use "
            "--form tight and then llama.cpp's convert_lora_to_gguf.py; or --form merged and then its "
            "convert_hf_to_gguf.py"
        )
    return found


def check_gguf(adapter: AdapterFile, config: Any | None) -> Architecture:
    """The architecture of the base model, if llama.cpp can load what the adapter holds.

    Raises:
        AdapterError: see :func:`check_architecture`; or the adapter holds what llama.cpp does not load.
    """
    check_plain(adapter, "gguf")
    architecture = check_architecture(config, adapter)
    assert config is not None
    if any(one.is_convolution for one in adapter.updates.values()):
        raise AdapterError("the form 'gguf' has no convolutions: use --form merged")
    adapter.check_sizes(dict.fromkeys(adapter.updates, config.vocab_size))
    if config.tie_word_embeddings and any(name.rpartition(".")[2] == "lm_head" for name in adapter.updates):
        raise AdapterError(
            "lm_head has a LoRA, and in a GGUF file of this base model there is no lm_head, because its weight is that "
            "of the embedding: use --form merged"
        )
    return architecture


def write_gguf(adapter: AdapterFile, folder: Path, config: Any | None, dtype: torch.dtype | None) -> tuple[str, ...]:
    """Writes the file. Returns notes for the user.

    Args:
        config: the configuration of the base model.
        dtype: float32 or float16; None: float32.

    Raises:
        AdapterError: see :func:`check_architecture`; or the adapter holds what llama.cpp does not load.
        MissingPackageError: the package gguf is not installed.
    """
    require("the form gguf", "gguf")
    import gguf

    architecture = check_gguf(adapter, config)
    chosen = dtype or torch.float32
    if chosen not in (torch.float32, torch.float16):
        raise AdapterError(f"--dtype {str(chosen).removeprefix('torch.')}: the form 'gguf' has float32 or float16")
    folded, notes = fold(
        adapter, {name: one.scaling * one.rank / ALPHA for name, one in adapter.updates.items()}, chosen
    )
    names = _names(architecture, config, folded)
    writer = gguf.GGUFWriter(folder / FILE, architecture.name)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, ALPHA)
    for name, one in folded.items():
        A = one.A.T if one.is_embedding else one.A
        B = _reordered(one.B, name, architecture, config)
        writer.add_tensor(f"{names[name]}.lora_a", A.contiguous().numpy())
        writer.add_tensor(f"{names[name]}.lora_b", B.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return notes


def read_gguf(adapter: AdapterFile, folder: Path, config: Any) -> dict[str, Factors]:
    """What llama.cpp makes of the file, back in the order and under the names of transformers."""
    import gguf

    reader = gguf.GGUFReader(folder / FILE)
    alpha = float(reader.fields[gguf.Keys.Adapter.LORA_ALPHA].contents())
    tensors = {one.name: torch.from_numpy(one.data.copy()).double() for one in reader.tensors}
    architecture = check_architecture(config, adapter)
    found = {}
    for name, gguf_name in _names(architecture, config, adapter.updates).items():
        A, B = tensors[f"{gguf_name}.lora_a"], tensors[f"{gguf_name}.lora_b"]
        rows = _reordered(torch.arange(len(B))[:, None], name, architecture, config)[:, 0]
        B = B[torch.argsort(rows)]  # the inverse of the order
        found[name] = (alpha / B.shape[1] * B, A.T if adapter.updates[name].is_embedding else A)
    return found


def gguf_dtype(folder: Path) -> torch.dtype:
    """The dtype of the file's weights."""
    import gguf

    kinds = {one.tensor_type for one in gguf.GGUFReader(folder / FILE).tensors}
    return torch.float16 if gguf.GGMLQuantizationType.F16 in kinds else torch.float32


def _names(architecture: Architecture, config: Any, updates: Mapping[str, Update]) -> dict[str, str]:
    import gguf

    table = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, architecture.tensors), config.num_hidden_layers)
    names = {name: table.get_name(f"{name}.weight", try_suffixes=(".weight",)) for name in updates}
    unknown = [name for name, found in names.items() if found is None]
    if unknown:
        raise AdapterError(
            f"llama.cpp has no tensor for {unknown[0]} in models of the kind {config.model_type!r}: use --form merged"
        )
    return {name: str(found) for name, found in names.items()}


def _reordered(B: Tensor, name: str, architecture: Architecture, config: Any) -> Tensor:
    """The rows of B in the order in which llama.cpp has those of the weight."""
    projection = name.rpartition(".")[2]
    if not architecture.reorders or projection not in ("q_proj", "k_proj"):
        return B
    heads = config.num_attention_heads if projection == "q_proj" else config.num_key_value_heads
    halves = B.reshape(heads, 2, len(B) // heads // 2, B.shape[1])  # (heads, halves, pairs, r)
    return halves.swapaxes(1, 2).reshape(B.shape)  # (heads, pairs, halves, r) → (d_out, r)
