"""YAML in and out, and `dotted.key=value` overrides."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import yaml

from lorank.config_errors import ConfigError


class _UniqueKeys(yaml.SafeLoader):
    """PyYAML's safe loader, which by itself lets a repeated key silently win over the first."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Hashable] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, Hashable) and key in seen:
                problem = f"the key {key!r} occurs twice"
                raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def parse_yaml(text: str) -> Any:
    """One YAML document, safely; raises yaml.YAMLError."""
    return yaml.load(text, Loader=_UniqueKeys)


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file that holds a mapping.

    Raises:
        ConfigError: it is not there, not YAML, or holds something else.
    """
    try:
        values = parse_yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(
            f"{path}: there is no such file. Give a recipe (recipes/e2e_alora.yaml) or a YAML file of your own."
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds {type(values).__name__}, expected keys with values (model:, task:, …).")
    return values


def apply_overrides(values: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """A copy of nested mappings with `dotted.key=value` put in, values read as YAML.

    Raises:
        ConfigError: one or more overrides have no `=`, an empty key, a value that is not YAML, or a path that leads
            through something that is not a mapping; all of them are named.
    """
    result, wrong = deepcopy(dict(values)), []
    for override in overrides:
        key, equals, text = override.partition("=")
        parts = key.strip().split(".")
        if not equals or not all(parts):
            wrong.append(f"{override!r}: expected key=value, as in training.lr=3e-4")
            continue
        try:
            value = parse_yaml(text)
        except yaml.YAMLError as error:
            wrong.append(f"{override!r}: the value is not YAML ({' '.join(str(error).split())})")
            continue
        place: dict[str, Any] = result
        for depth, part in enumerate(parts[:-1], start=1):
            if place.get(part) is None:
                place[part] = {}
            place = place[part]
            if not isinstance(place, dict):
                wrong.append(f"{override!r}: {'.'.join(parts[:depth])} is {place!r} and has no keys below it")
                break
        else:
            place[parts[-1]] = value
    if wrong:
        raise ConfigError("Wrong overrides:\n" + "\n".join(f"  {line}" for line in wrong))
    return result


def dump_yaml(values: Mapping[str, Any]) -> str:
    """YAML in the given order of keys."""
    return yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True, width=120)
