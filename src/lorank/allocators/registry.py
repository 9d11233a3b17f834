"""The methods that a recipe can name: lorank's own methods and those that other packages register.

A package registers a method by a packaging entry point in the group ``lorank.allocators``:

    [project.entry-points."lorank.allocators"]
    magnitude = "my_package.magnitude:MagnitudePruning"

A recipe gives this name as ``allocator.name``. The entry point must refer to a frozen dataclass derived from
:class:`lorank.Allocator`. A method that cannot be loaded does not affect the other methods.
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

# Lorank's own methods are listed here instead of in entry points of its distribution. Entry points are read from
# metadata that pip writes when it installs a package, so in an editable installation a new method would be missing
# until the next installation. The methods are loaded in the same way as entry points.
OWN: Mapping[str, str] = {
    "static": "lorank.allocators.static:StaticLoRA",
    "balanced": "lorank.allocators.balanced:BalancedLoRA",
    "alora": "lorank.allocators.alora:ALoRA",
    "alora_dnas": "lorank.allocators.alora_dnas:ALoRADNAS",
    "alora_sensi": "lorank.allocators.alora_sensi:ALoRASensi",
    "ard": "lorank.allocators.ard:ARDLoRA",
    "adalora": "lorank.allocators.adalora:AdaLoRA",
    "sora": "lorank.allocators.sora:SoRA",
}
"""Lorank's own methods: from the name in recipes to the module and class."""

RESERVED = frozenset({"full"})
"""Names with another meaning in recipes: ``full`` is full fine-tuning, which has no ranks."""

logger = logging.getLogger("lorank")


@dataclass(frozen=True)
class Registry:
    """The installed methods.

    Args:
        classes: by name, lorank's own methods first, then the others in alphabetical order.
        refused: by name, why a method that another package registers cannot be used. It does not contain a name that
            lorank itself uses, because a recipe can still use this name.
    """

    classes: Mapping[str, type[Allocator]]
    refused: Mapping[str, str]


def find_allocators() -> Registry:
    """Imports all methods: lorank's own methods and those of other installed packages.

    A method is left out if it cannot be imported, is not a frozen dataclass derived from :class:`Allocator`, or has a
    name that lorank itself uses. A logged warning then names the distribution and the reason. If two distributions
    register different methods under the same name, both are left out, because a recipe with this name is ambiguous.
    """
    classes = {name: EntryPoint(name, value, GROUP).load() for name, value in OWN.items()}
    refused: dict[str, str] = {}
    found: dict[str, list[EntryPoint]] = {}
    for entry in entry_points(group=GROUP):
        found.setdefault(entry.name, []).append(entry)
    for name, entries in sorted(found.items()):
        who = " and ".join(sorted({_distribution(entry) for entry in entries}))
        if name in OWN or name in RESERVED:
            _warn(name, who, "lorank itself uses this name. Ask the authors of the package for another name")
        elif len({entry.value for entry in entries}) > 1:
            refused[name] = f"{who} register different methods under this name. Uninstall one of them"
            _warn(name, who, refused[name])
        else:
            try:
                classes[name] = _load(entries[0])
            except (Exception, SystemExit) as error:  # a foreign module may raise any error when it is imported
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
    # The parameters of the class itself: annotations of a class that only inherits from a dataclass are not fields.
    parameters = vars(found).get("__dataclass_params__")
    if not (dataclasses.is_dataclass(found) and parameters is not None and parameters.frozen):
        raise TypeError(f"{entry.value} is not a frozen dataclass: decorate the class with @dataclass(frozen=True)")
    return found


def _distribution(entry: EntryPoint) -> str:
    return entry.dist.name if entry.dist is not None else "an unknown distribution"


def _warn(name: str, who: str, reason: str) -> None:
    # Logged instead of raised as a Python warning: with "-W error", such a warning would stop all other methods.
    logger.warning("the method %r of %s is left out: %s", name, who, reason)
