"""How a saved adapter states that a module has rank 0. Absent weights state nothing.

A file of an adapter holds no module of rank 0, because PEFT and servers cannot load rank 0. So the statement is beside
the weights, in two places:

- A ``state_dict()`` of the whole model: as the extra state of the layer, a small tensor under PyTorch's key for extra
  states. It survives every format that keeps tensors by name, also safetensors. PEFT does not put it in an adapter's
  file.
- A folder: in ``target_modules`` of its configuration, as the entry ``rank-0:`` and the module's full name. PEFT adapts
  the modules whose names it finds in ``target_modules``. No module has such a name, so PEFT reads, merges and combines
  the configuration as without the entry, and gives no warning. (An entry in ``rank_pattern`` gives a warning, and
  ``exclude_modules`` would also exclude the module from an adapter that ``add_weighted_adapter`` makes.) If only
  parameters have ranks, the entries are in ``target_parameters``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import Tensor

EXTRA_STATE = "_extra_state"
"""PyTorch's name of the extra state of a module in a state dict."""
_FIELD = "rank 0"
_PREFIX = "rank-0:"


def extra_state(adapters: Collection[str]) -> Tensor:
    """The extra state of a layer that has rank 0 for these adapters: JSON as uint8, (bytes,)."""
    return torch.tensor(list(json.dumps({_FIELD: sorted(adapters)}).encode()), dtype=torch.uint8)


def stated_adapters(value: Any) -> frozenset[str]:
    """The adapters for which an extra state states rank 0; none if it is not an :func:`extra_state`."""
    if not isinstance(value, Tensor):
        return frozenset()
    try:
        return frozenset(json.loads(bytes(int(byte) for byte in value.flatten().tolist()))[_FIELD])
    except (ValueError, KeyError, TypeError):
        return frozenset()


def target_entries(names: Iterable[str]) -> list[str]:
    """The entries of ``target_modules`` that state rank 0 for these modules."""
    return [f"{_PREFIX}{name}" for name in names]


def target_pattern(alive: Iterable[str], empty: Iterable[str]) -> str:
    """``target_modules`` as one regular expression: the full names with ranks, and the entries that state rank 0."""
    return "|".join([*(re.escape(name) for name in alive), *(f"{_PREFIX}{re.escape(name)}" for name in empty)])


def stated_in_targets(target_modules: str | Collection[str] | None, names: Iterable[str]) -> frozenset[str]:
    """Those of ``names`` that ``target_modules`` of a configuration states at rank 0."""
    if isinstance(target_modules, str):
        entries = set(target_modules.split("|"))
        return frozenset(name for name in names if f"{_PREFIX}{re.escape(name)}" in entries)
    entries = set(target_modules or ())
    return frozenset(name for name in names if f"{_PREFIX}{name}" in entries)


def stated_entries(
    target_modules: str | Collection[str] | None, former: str | Collection[str] | None
) -> str | Collection[str] | None:
    """``target_modules`` and, besides, the statements of rank 0 that ``former`` target modules hold."""
    entries = former.split("|") if isinstance(former, str) else (former or ())
    kept = sorted(entry for entry in entries if entry.startswith(_PREFIX))
    if isinstance(target_modules, str):
        return "|".join([target_modules, *kept])
    return {*(target_modules or ()), *(entry.replace("\\", "") for entry in kept)}
