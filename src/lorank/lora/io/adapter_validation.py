"""An adapter's files before anything is made of them: adapters come from strangers.

PEFT takes what a file says: it would unpickle ``adapter_model.bin``, import a module that ``megatron_core`` names,
allocate whatever ``r`` asks for, and match patterns that take longer than anybody waits. All of that is refused here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from lorank.errors import AdapterError
from lorank.files import parse_json, read_bounded
from lorank.lora.io.safe_patterns import check_pattern

CONFIG, WEIGHTS, PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
MAX_CONFIG_BYTES = 16_000_000
PLAIN_RANK = 1024
"""A rank that may be named though no weight has it (every module then has its own); above, it must be in the file."""
_REFUSED = {
    "megatron_config": "it makes PEFT import a module that the file names",
    "layer_replication": "it makes a larger model of the base model",
}
_LISTS_OF_NAMES = ("modules_to_save", "target_parameters", "layers_pattern")


def read_config(path: Path) -> dict[str, Any]:
    """The settings of a LoRA adapter, their kinds and sizes checked.

    Raises:
        AdapterError: it cannot be read, is of another kind than LoRA, or asks for something that is refused.
    """
    try:
        config = parse_json(read_bounded(path, MAX_CONFIG_BYTES))
    except (OSError, ValueError) as error:
        raise AdapterError(f"{path} cannot be read: {error}. Save the adapter again") from error
    kind = config.get("peft_type") if isinstance(config, dict) else None
    if kind != "LORA":
        raise AdapterError(f"{path} is of kind {str(kind)[:80]!r}, not 'LORA': only LoRA has ranks")
    try:
        _check(config)
    except ValueError as error:
        raise AdapterError(f"{path}: {error}") from error
    return dict(config)


def check_weights(folder: Path, config: Mapping[str, Any]) -> None:
    """Whether the weights are a whole safetensors file, and the ranks that the settings name are about those in it.

    Only the file's header is read.

    Raises:
        AdapterError: there is none, or only a pickle; it is damaged; ranks that would be allocated are not in it.
    """
    path = folder / WEIGHTS
    if not path.is_file():
        if (folder / PICKLED).is_file():
            raise AdapterError(
                f"{folder} has its weights in {PICKLED}, a pickle, which can run anything when it is read. If you "
                "trust it, load it with PEFT and save it again; that gives safetensors"
            )
        raise AdapterError(f"{folder} has no {WEIGHTS}: copy it again, or save the adapter again")
    try:
        with safe_open(path, framework="pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118  # not a dict
    except (OSError, ValueError, SafetensorError) as error:
        raise AdapterError(f"the weights in {folder} cannot be read: {error}. Copy it again") from error
    inner = [shape[0] for name, shape in shapes.items() if "lora_A" in name or "lora_embedding_A" in name if shape]
    most = max([PLAIN_RANK, *inner])
    named = [config.get("r", 8), *config.get("rank_pattern", {}).values()]
    if max(named) > most:
        raise AdapterError(
            f"{folder / CONFIG} names rank {max(named)}, and the largest in {WEIGHTS} is {max(inner, default=0)}: the "
            "two do not belong together"
        )


def _check(config: Mapping[str, Any]) -> None:
    """Raises ValueError for what LoRA's settings cannot be."""
    for name, why in _REFUSED.items():
        if config.get(name) is not None:
            raise ValueError(f"{name} is refused: {why}")
    for name, value in config.items():
        if name in ("rank_pattern", "alpha_pattern"):
            if not isinstance(value, dict):
                raise ValueError(f"{name}: expected a mapping from module names, got {type(value).__name__}")
            for key, number in value.items():
                (_rank if name == "rank_pattern" else _number)(f"{name}[{key[:80]!r}]", number)
                check_pattern(name, key)
    if "r" in config:
        _rank("r", config["r"])
    for name in ("lora_alpha", "lora_dropout"):
        if name in config:
            _number(name, config[name])
    if not 0 <= config.get("lora_dropout", 0) < 1:
        raise ValueError(f"lora_dropout: expected 0 ≤ p < 1, got {config['lora_dropout']!r}")
    for name, pattern in _patterns(config):
        check_pattern(name, pattern)


def _patterns(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What PEFT reads as regular expressions, besides the two mappings."""
    for name in ("target_modules", "exclude_modules"):
        value = config.get(name)
        if isinstance(value, str):
            yield name, value
        elif value is not None:
            _names(name, value)
    for name in _LISTS_OF_NAMES:
        value = config.get(name)
        if value is not None:
            value = [value] if isinstance(value, str) else value
            _names(name, value)
            for pattern in value:
                yield name, pattern


def _names(name: str, value: Any) -> None:
    if not (isinstance(value, list) and all(isinstance(part, str) for part in value)):
        raise ValueError(f"{name}: expected names, got {str(value)[:80]}")


def _rank(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name}: expected a rank of at least 1, got {str(value)[:80]}")


def _number(name: str, value: Any) -> None:
    right = isinstance(value, int | float) and not isinstance(value, bool)
    if not right or abs(value) > 1e30 or not math.isfinite(value):
        raise ValueError(f"{name}: expected a number, got {str(value)[:80]}")
