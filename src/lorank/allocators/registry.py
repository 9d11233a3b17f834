"""Which methods recipes can name: lorank's own, and those that other packages register.

A package registers a method by a packaging entry point in the group ``lorank.allocators``:

    [project.entry-points."lorank.allocators"]
    magnitude = "my_package.magnitude:MagnitudePruning"

The name is what stands in a recipe's ``allocator.name``; what it leads to is a frozen dataclass derived from
:class:`lorank.Allocator`. A method that cannot be used never keeps the others from working.
"""

from __future__ import annotations

import dataclasses
import inspect
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from lorank.allocators.base import Allocator

GROUP = "lorank.allocators"
"""The group of entry points."""

# Lorank's own methods stand here and are no entry points of its distribution: entry points are read from what pip wrote
# when it installed, so in an editable installation a new method would be missing until somebody installs again. They
# are loaded in the same way.
OWN: Mapping[str, str] = {
    "static": "lorank.allocators.static:StaticLoRA",
    "alora": "lorank.allocators.alora:ALoRA",
    "alora_dnas": "lorank.allocators.alora_dnas:ALoRADNAS",
    "alora_sensi": "lorank.allocators.alora_sensi:ALoRASensi",
    "ard": "lorank.allocators.ard:ARDLoRA",
    "adalora": "lorank.allocators.adalora:AdaLoRA",
    "sora": "lorank.allocators.sora:SoRA",
}
"""Lorank's own methods: the name in recipes, and where the class is."""

RESERVED = frozenset({"full"})
"""Names that mean something else in recipes: full fine-tuning, which has no ranks."""

logger = logging.getLogger("lorank")


@dataclass(frozen=True)
class Registry:
    """The methods that are there.

    Args:
        classes: by name, lorank's own first, the others in alphabetical order.
        refused: by name, why a method that some package registers cannot be used. A name that is taken by one of
            lorank's own methods is not among them, because it has a meaning.
    """

    classes: Mapping[str, type[Allocator]]
    refused: Mapping[str, str]


def find_allocators() -> Registry:
    """Imports all methods: lorank's own, and those of the packages that are installed beside it.

    What cannot be used is left out, with a warning that names the distribution and the reason: it cannot be imported,
    is not a frozen dataclass derived from :class:`Allocator`, or its name is taken. Where two distributions register
    different methods under one name, both are left out, since nobody could tell which of them a recipe means.
    """
    classes = {name: EntryPoint(name, value, GROUP).load() for name, value in OWN.items()}
    refused: dict[str, str] = {}
    found: dict[str, list[EntryPoint]] = {}
    for entry in entry_points(group=GROUP):
        found.setdefault(entry.name, []).append(entry)
    for name, entries in sorted(found.items()):
        who = " and ".join(sorted({_distribution(entry) for entry in entries}))
        if name in OWN or name in RESERVED:
            _warn(name, who, "the name is taken by lorank itself. Ask its authors for another name")
        elif len({entry.value for entry in entries}) > 1:
            refused[name] = f"{who} register different methods under this name. Uninstall one of them"
            _warn(name, who, refused[name])
        else:
            try:
                classes[name] = _load(entries[0])
            except (Exception, SystemExit) as error:  # whatever a module of somebody else does when it is imported
                reason = f"{type(error).__name__}: {error}"
                refused[name] = f"the method that {who} registers as {entries[0].value!r} cannot be used. {reason}"
                _warn(name, who, reason)
    return Registry(classes, refused)


def _load(entry: EntryPoint) -> type[Allocator]:
    found: Any = entry.load()
    if not (isinstance(found, type) and issubclass(found, Allocator)):
        raise TypeError(
            f"{entry.value} is not a class derived from lorank.Allocator: derive it, and register the class"
        )
    if inspect.isabstract(found):
        missing = ", ".join(sorted(found.__abstractmethods__))
        raise TypeError(f"{entry.value} is abstract: it must define {missing}")
    # Of the class itself: one that only inherits from a dataclass has settings that are not fields.
    parameters = vars(found).get("__dataclass_params__")
    if not (dataclasses.is_dataclass(found) and parameters is not None and parameters.frozen):
        raise TypeError(f"{entry.value} is not a frozen dataclass: decorate the class with @dataclass(frozen=True)")
    return found


def _distribution(entry: EntryPoint) -> str:
    return entry.dist.name if entry.dist is not None else "an unknown distribution"


def _warn(name: str, who: str, reason: str) -> None:
    # Logged and not raised as a Python warning, which "-W error" would make an error for all other methods.
    logger.warning("the method %r of %s is left out: %s", name, who, reason)
