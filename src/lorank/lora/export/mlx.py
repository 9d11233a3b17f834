"""An adapter for MLX-LM: A and B transposed, one rank and one scale for all modules, and settings of its own.

    model.layers.0.self_attn.q_proj.lora_a   (d_in, r)          y = W x + scale · (x lora_a) lora_b
    model.layers.0.self_attn.q_proj.lora_b   (r, d_out)         scale = 1: s is in lora_b

Modules with fewer ranks are filled up with zeros. MLX-LM adapts the same projections in all layers. Where the file has
no weights for one of them, its lora_b is zero.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from lorank.errors import AdapterError
from lorank.lora.export.adapter_file import AdapterFile
from lorank.lora.export.comparison import Factors
from lorank.lora.export.peft_forms import check_plain, fold

WEIGHTS, CONFIG = "adapters.safetensors", "adapter_config.json"
_IN_LAYER = re.compile(r"(?:.*\.)?layers\.\d+\.(.+)")


def write_mlx(
    adapter: AdapterFile, folder: Path, config: Any | None, dtype: torch.dtype | None, rank: int | None
) -> tuple[str, ...]:
    """Writes the two files. Returns notes for the user.

    Args:
        config: the configuration of the base model, or None.
        rank: the rank of all modules; None: the largest in the adapter.

    Raises:
        AdapterError: the adapter holds what MLX-LM does not load, or more ranks than ``rank``.
    """
    check_mlx(adapter, config)
    largest = max(adapter.ranks.values())
    if rank is not None and rank < largest:
        raise AdapterError(f"rank {rank} is below the largest rank of a module, {largest}: give at least {largest}")
    rank = rank or largest
    folded, notes = fold(adapter, {name: one.scaling for name, one in adapter.updates.items()}, dtype)
    tensors = {}
    for name, one in folded.items():
        A, B = one.A.new_zeros(one.A.shape[1], rank), one.B.new_zeros(rank, len(one.B))
        A[:, : one.rank], B[: one.rank] = one.A.T, one.B.T
        tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"] = A, B
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    keys = sorted({match[1] if (match := _IN_LAYER.fullmatch(name)) else name for name in folded})
    settings = {
        "fine_tune_type": "lora",
        "num_layers": getattr(config, "num_hidden_layers", None) or -1,  # −1: all
        "lora_parameters": {"rank": rank, "scale": 1.0, "dropout": 0.0, "keys": keys},
    }
    if adapter.config.base_model_name_or_path:
        settings["model"] = adapter.config.base_model_name_or_path
    (folder / CONFIG).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    return notes


def read_mlx(folder: Path) -> dict[str, Factors]:
    """What MLX-LM makes of the files: s · B and A of every module."""
    scale = json.loads((folder / CONFIG).read_text(encoding="utf-8"))["lora_parameters"]["scale"]
    tensors = load_file(folder / WEIGHTS)
    found = {}
    for key, A in tensors.items():
        if key.endswith(".lora_a"):
            name = key.removesuffix(".lora_a")
            found[name] = (scale * tensors[f"{name}.lora_b"].T.double(), A.T.double())
    return found


def check_mlx(adapter: AdapterFile, config: Any | None) -> None:
    """Raises AdapterError if the adapter holds what MLX-LM does not load.

    Args:
        config: the configuration of the base model, or None.
    """
    check_plain(adapter, "mlx")
    for name, one in adapter.updates.items():
        if one.is_convolution:
            raise AdapterError(f"{name} is a convolution, which MLX-LM does not adapt: use --form merged")
        if one.is_embedding and getattr(config, "tie_word_embeddings", True):
            raise AdapterError(
                f"{name} is an embedding whose weight is (or may be) that of the output layer, too. There MLX-LM would "
                "add the update once more, and PEFT does not: use --form merged"
            )
