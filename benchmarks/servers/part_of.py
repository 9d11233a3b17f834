"""Imports single files of a large package, with stand-ins for the rest of it.

The loading code of an engine is a few files, which import the whole engine, its kernels and many packages. Here the
files that read adapters are the engine's own; every other module of the package is a mock.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock


class StandIn(ModuleType):
    """A module in which every name is a mock, or the value given for it."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return MagicMock(name=f"{self.__name__}.{name}")


class _PartFinder(MetaPathFinder, Loader):
    def __init__(self, package: str, real: Sequence[str], values: dict[str, Any]) -> None:
        self.package, self.real, self.values = package, set(real), values
        found = PathFinder.find_spec(package)
        assert found is not None
        self.place = next(iter(found.submodule_search_locations or ()))

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name.partition(".")[0] != self.package:
            return None
        if name in self.real:
            folder = "/".join([self.place, *name.split(".")[1:-1]])
            return PathFinder.find_spec(name, [folder])
        return ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return StandIn(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        module.__dict__.update(self.values)


def use_part_of(package: str, real: Sequence[str], **values: Any) -> None:
    """From now on, imports of a package give its own files for the modules in ``real``, and stand-ins for others.

    Args:
        values: names that have a value in every stand-in.
    """
    sys.meta_path.insert(0, _PartFinder(package, real, values))
