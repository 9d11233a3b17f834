"""The configuration of a run: model, adapter, task, allocator and training, all checked before the run starts.

    config = load_config("e2e_alora", ["allocator.rounds=4", "training.lr=3e-4"])

An unknown key is an error. All errors are reported at once, each with the key's dotted path. The methods and their
defaults are not repeated here: each allocator's section is made from the fields of its dataclass.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
from collections.abc import Mapping, Sequence
from functools import reduce
from operator import or_
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, get_type_hints

from pydantic import BeforeValidator, Field, ValidationError, create_model, model_validator
from pydantic.fields import FieldInfo
from typing_extensions import Self

from lorank.allocators import Allocator, find_allocators
from lorank.allocators.registry import OWN
from lorank.allocators.settings import documented_settings
from lorank.config.errors import ConfigError, explain
from lorank.config.recipes import find_file, with_absolute_paths
from lorank.config.sections import RunSections
from lorank.config.yaml_files import apply_overrides, dump_yaml, read_yaml
from lorank.errors import LorankError
from lorank.tasks.settings import Settings

__all__ = ["ConfigError", "RunConfig", "json_schema", "load_config", "make_config", "to_yaml"]

logger = logging.getLogger("lorank")


class AllocatorSettings(Settings):
    """An allocator: its name and the fields of its dataclass."""

    name: str
    allocator: ClassVar[type[Allocator]]

    def build(self) -> Allocator:
        """The allocator with these settings."""
        return self.allocator(**{key: value for key, value in dict(self).items() if key != "name"})

    @model_validator(mode="after")
    def _allocator_accepts(self) -> Self:
        try:
            self.build()
        except LorankError as error:  # a condition between fields; pydantic lists it with the other errors
            raise ValueError(str(error)) from error
        return self


def _section(name: str, allocator: type[Allocator]) -> type[AllocatorSettings]:
    """The section of a method: the fields of its dataclass, with their bounds and descriptions."""
    hints = get_type_hints(allocator, include_extras=True)
    declared: Mapping[str, FieldInfo] = getattr(allocator, "__pydantic_fields__", {})
    documented = documented_settings(allocator)
    fields: dict[str, Any] = {"name": (Literal[name], ...)}
    for field in dataclasses.fields(allocator):  # type: ignore[arg-type]  # every allocator is a dataclass
        if not field.init:
            continue
        description = documented.get(field.name)
        if field.name in declared:
            info = copy.copy(declared[field.name])
            info.description = info.description or description
            fields[field.name] = (info.annotation, info)
        elif field.default_factory is not dataclasses.MISSING:
            made_new = Field(default_factory=field.default_factory, description=description)
            fields[field.name] = (hints[field.name], made_new)
        else:
            default = ... if field.default is dataclasses.MISSING else field.default
            fields[field.name] = (hints[field.name], Field(default, description=description))
    made: type[AllocatorSettings] = create_model(
        f"{allocator.__name__}Settings",
        __base__=AllocatorSettings,
        __doc__=allocator.__doc__,
        **fields,
    )
    made.allocator = allocator
    return made


def _sections(
    methods: Mapping[str, type[Allocator]], refused: Mapping[str, str]
) -> tuple[dict[str, type[AllocatorSettings]], dict[str, str]]:
    """(the section of each method, the reason why a registered method has no section), both by the method's name."""
    made: dict[str, type[AllocatorSettings]] = {}
    why = dict(refused)
    for name, allocator in methods.items():
        if name in OWN:
            made[name] = _section(name, allocator)
            continue
        try:
            if any(field.name == "name" for field in dataclasses.fields(allocator)):  # type: ignore[arg-type]  # as above
                raise TypeError("it has a setting called 'name', which is the method's own name in a recipe")
            section = _section(name, allocator)
            section.model_json_schema()  # one section without a schema would break the schema of the whole file
        except Exception as error:  # a type that does not exist at run time, or that YAML cannot express
            where = f"{allocator.__module__}.{allocator.__qualname__}"
            why[name] = f"the settings of {where} cannot be written in a recipe. {type(error).__name__}: {error}"
            logger.warning("the method %r cannot be used in recipes: %s", name, why[name])
        else:
            made[name] = section
    return made, why


def _refuse_unusable_method(given: Any) -> Any:
    name = given.get("name") if isinstance(given, Mapping) else None
    if isinstance(name, str) and name in REFUSED:
        raise ValueError(f"name {name!r}: {REFUSED[name]}")
    return given


class FullSettings(Settings):
    """Full fine-tuning, for comparison: every weight of the model is trained, and there is no adapter."""

    name: Literal["full"]


# Importing this module imports the methods of other packages, even if no recipe names them: their fields decide the
# keys of a recipe, its JSON schema and the suggested keys in messages.
_REGISTRY = find_allocators()
METHODS: Mapping[str, type[Allocator]] = _REGISTRY.classes
ALLOCATORS, REFUSED = _sections(METHODS, _REGISTRY.refused)
if TYPE_CHECKING:
    AnyAllocator = AllocatorSettings | FullSettings
else:
    AnyAllocator = Annotated[
        reduce(or_, [*ALLOCATORS.values(), FullSettings]),
        Field(discriminator="name"),
        BeforeValidator(_refuse_unusable_method),
    ]


class RunConfig(RunSections):
    """One training run."""

    allocator: AnyAllocator
    """The method that moves ranks; static: ranks do not move; full: no adapter, every weight is trained."""

    @model_validator(mode="after")
    def _weights_can_be_trained(self) -> Self:
        if isinstance(self.allocator, FullSettings) and self.model.quantised is not None:
            raise ValueError(
                f"model.quantised is {self.model.quantised} and allocator.name is full, but quantised weights cannot "
                "be trained: leave out model.quantised, or train an adapter, such as allocator.name balanced"
            )
        return self


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Reads and checks a configuration from a YAML file.

    Args:
        path: the file, or the name of a recipe in the package (`e2e_alora`). Its relative paths start from its folder.
        overrides: `dotted.key=value`, each value read as YAML; they replace the values in the file. Their relative
            paths start from the current folder.

    Raises:
        ConfigError: the file does not exist or is not YAML, an override is malformed, or keys or values are wrong. The
            message lists all errors, each with its dotted path and, for an unknown key, the nearest known key.
    """
    file = find_file(path)
    return make_config(with_absolute_paths(read_yaml(file), file.parent), overrides, source=str(path))


def make_config(
    values: Mapping[str, Any], overrides: Sequence[str] = (), *, source: str = "configuration"
) -> RunConfig:
    """Checks a configuration given as nested mappings.

    Args:
        values: nested mappings, as in the YAML file.
        overrides: see `load_config`.
        source: the name of the configuration in error messages.

    Raises:
        ConfigError: see `load_config`.
    """
    changed = apply_overrides(values, overrides)
    try:
        return RunConfig.model_validate(changed)
    except ValidationError as error:
        raise ConfigError(explain(error, RunConfig, source, changed)) from error


def to_yaml(config: RunConfig) -> str:
    """The configuration with every default written out; loading it gives the same configuration."""
    return dump_yaml(config.model_dump(mode="json"))


def json_schema() -> dict[str, Any]:
    """The JSON schema of a configuration file, for editors."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **RunConfig.model_json_schema()}
