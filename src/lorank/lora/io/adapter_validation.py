"""Validates an adapter's files before PEFT reads them, because adapters may come from untrusted sources.

PEFT trusts these files. It unpickles ``adapter_model.bin``, imports the module that ``megatron_core`` names, allocates
as many ranks as ``r`` says, and matches regular expressions that may take too long. All of this is refused here.
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
MAX_UNVERIFIED_RANK = 1024
"""Up to this rank, the settings may name a rank that no weight in the file has. A larger rank must be in the file."""
_REFUSED = {
    "megatron_config": "it makes PEFT import a module that the file names",
    "layer_replication": "it makes PEFT enlarge the base model",
}
_LISTS_OF_NAMES = ("modules_to_save", "target_parameters", "layers_pattern")


def read_config(path: Path) -> dict[str, Any]:
    """Reads the settings of a LoRA adapter and checks their types and ranges.

    Raises:
        AdapterError: the file cannot be read, has another ``peft_type`` than LoRA, or has a setting that is refused.
    """
    try:
        config = parse_json(read_bounded(path, MAX_CONFIG_BYTES))
    except (OSError, ValueError) as error:
        raise AdapterError(f"{path} cannot be read: {error}. Save the adapter again") from error
    kind = config.get("peft_type") if isinstance(config, dict) else None
    if kind != "LORA":
        raise AdapterError(f"{path} has peft_type {str(kind)[:80]!r}, expected 'LORA': lorank supports LoRA only")
    try:
        _check(config)
    except ValueError as error:
        raise AdapterError(f"{path}: {error}") from error
    return dict(config)


def check_weights(folder: Path, config: Mapping[str, Any]) -> None:
    """Checks that the weights are a complete safetensors file that fits the ranks in the settings.

    Only the file's header is read.

    Raises:
        AdapterError: the file is missing, is a pickle or is damaged, or the settings name a large rank
            (> ``MAX_UNVERIFIED_RANK``) that no weight in the file has.
    """
    path = folder / WEIGHTS
    if not path.is_file():
        if (folder / PICKLED).is_file():
            raise AdapterError(
                f"{folder} has its weights in {PICKLED}, a pickle, which can run any code when it is read. If you "
                "trust it, load it with PEFT and save it again, which writes safetensors"
            )
        raise AdapterError(f"{folder} has no {WEIGHTS}: copy it again, or save the adapter again")
    try:
        with safe_open(path, framework="pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118  # not a dict
    except (OSError, ValueError, SafetensorError) as error:
        raise AdapterError(f"the weights in {folder} cannot be read: {error}. Copy the adapter again") from error
    ranks_in_file = [
        shape[0] for name, shape in shapes.items() if "lora_A" in name or "lora_embedding_A" in name if shape
    ]
    largest_allowed = max([MAX_UNVERIFIED_RANK, *ranks_in_file])
    named = [config.get("r", 8), *config.get("rank_pattern", {}).values()]
    if max(named) > largest_allowed:
        raise AdapterError(
            f"{folder / CONFIG} names rank {max(named)}, but the largest rank in {WEIGHTS} is "
            f"{max(ranks_in_file, default=0)}: the two files do not belong together. Save the adapter again"
        )


def _check(config: Mapping[str, Any]) -> None:
    """Raises ValueError for a setting that is refused or out of range."""
    for name, why in _REFUSED.items():
        if config.get(name) is not None:
            raise ValueError(f"{name} is refused: {why}")
    for name, value in config.items():
        if name in ("rank_pattern", "alpha_pattern"):
            if not isinstance(value, dict):
                raise ValueError(f"{name}: expected a mapping from module names, got {type(value).__name__}")
            for key, number in value.items():
                (_check_rank if name == "rank_pattern" else _check_number)(f"{name}[{key[:80]!r}]", number)
                check_pattern(name, key)
    if "r" in config:
        _check_rank("r", config["r"])
    for name in ("lora_alpha", "lora_dropout"):
        if name in config:
            _check_number(name, config[name])
    if not 0 <= config.get("lora_dropout", 0) < 1:
        raise ValueError(f"lora_dropout: expected 0 ≤ p < 1, got {config['lora_dropout']!r}")
    for name, pattern in _patterns(config):
        check_pattern(name, pattern)


def _patterns(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yields the settings that PEFT treats as regular expressions, except for the keys of the two mappings."""
    for name in ("target_modules", "exclude_modules"):
        value = config.get(name)
        if isinstance(value, str):
            yield name, value
        elif value is not None:
            _check_names(name, value)
    for name in _LISTS_OF_NAMES:
        value = config.get(name)
        if value is not None:
            value = [value] if isinstance(value, str) else value
            _check_names(name, value)
            for pattern in value:
                yield name, pattern


def _check_names(name: str, value: Any) -> None:
    if not (isinstance(value, list) and all(isinstance(part, str) for part in value)):
        raise ValueError(f"{name}: expected a list of names, got {str(value)[:80]}")


def _check_rank(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name}: expected a rank of at least 1, got {str(value)[:80]}")


def _check_number(name: str, value: Any) -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or abs(value) > 1e30 or not math.isfinite(value):
        raise ValueError(f"{name}: expected a number, got {str(value)[:80]}")
