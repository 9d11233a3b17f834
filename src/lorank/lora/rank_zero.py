"""How a saved adapter states that a module has rank 0. Absent weights state nothing.

A file of weights holds no module of rank 0, because PEFT and servers cannot load rank 0. So the statement is beside the
weights, in two places:

- A ``state_dict()``: in the metadata that PyTorch keeps with it. They survive ``torch.save`` and ``copy.deepcopy``.
- A folder: in ``target_modules`` of its configuration, as the entry ``rank-0:`` and the module's full name. PEFT adapts
  the modules whose names it finds in ``target_modules``. No module has such a name, so PEFT reads, merges and combines
  the configuration as without the entry, and gives no warning. (An entry in ``rank_pattern`` gives a warning, and
  ``exclude_modules`` would also exclude the module from an adapter that ``add_weighted_adapter`` makes.)
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

KEY = "lorank_rank_0"
"""The key in a module's metadata: for each adapter, the names of the layers at rank 0 in this module."""
_PREFIX = "rank-0:"


def state_in_metadata(state_dict: Any, prefix: str, adapter: str) -> None:
    """States in the metadata of a state dict that the layer with this prefix has rank 0.

    The statement is made for the layer and all modules around it, because a hook that loads weights into one of these
    modules gets only the metadata of this module.

    Args:
        state_dict: the result of ``state_dict()``; without metadata, nothing can be stated.
        prefix: the prefix of the layer's keys, with a dot at the end.
        adapter: the adapter's name.
    """
    metadata: Mapping[str, dict[str, Any]] = getattr(state_dict, "_metadata", {})
    parts = prefix.removesuffix(".").split(".")
    for i in range(len(parts)):
        outer = metadata.get(".".join(parts[:i]))
        if outer is not None:
            outer.setdefault(KEY, {}).setdefault(adapter, []).append(".".join(parts[i:]))


def stated_in_metadata(metadata: Mapping[str, Any], adapter: str) -> frozenset[str]:
    """The modules that the metadata of a module's weights state at rank 0, by their names in this module."""
    return frozenset(metadata.get(KEY, {}).get(adapter, ()))


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
