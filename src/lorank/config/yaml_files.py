"""Reading and writing YAML, `dotted.key=value` overrides, and references (`${training.lr}`), resolved last.

People share configurations, so a file may come from an untrusted source. It is read by the safe loader, which makes
plain values only. Its size, its depth and its size with all aliases expanded are checked before any value is made.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import yaml

from lorank.config.errors import ConfigError
from lorank.config.references import escape_references, resolve_references, wrong_references
from lorank.files import read_bounded

MAX_BYTES = 1_000_000
MAX_NODES = 20_000
"""The largest number of values with all aliases expanded: a few aliases of aliases can expand beyond memory."""
MAX_DEPTH = 50


class _UniqueKeys(yaml.SafeLoader):
    """PyYAML's safe loader, with an error for a repeated key. PyYAML itself keeps the last value without a warning."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Hashable] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            try:
                twice = key in seen
            except TypeError:
                problem = "a list or a mapping cannot be a key"
                raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark) from None
            if twice:
                problem = f"the key {str(key)[:80]!r} occurs twice"
                raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def parse_yaml(text: str) -> Any:
    """The values of one YAML document, read by the safe loader.

    Raises:
        yaml.YAMLError: the document cannot be read, for any reason.
    """
    loader = _UniqueKeys(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _check_size(node)
        return loader.construct_document(node)
    except RecursionError as error:
        raise yaml.YAMLError("the document is nested too deeply") from error
    except yaml.YAMLError:
        raise
    except Exception as error:  # PyYAML raises errors of many kinds, for example for a date that does not exist
        raise yaml.YAMLError(f"a value cannot be read ({type(error).__name__}: {error})") from error
    finally:
        loader.dispose()


def _check_size(root: yaml.Node) -> None:
    """Raises yaml.YAMLError if the document is nested too deeply, or too large with its aliases expanded."""
    done: dict[int, tuple[int, int]] = {}  # size and height of each node; an alias is the same node again
    above: set[int] = set()

    def measure(node: yaml.Node) -> tuple[int, int]:
        if id(node) in above:
            raise yaml.YAMLError("an alias refers to a value that contains the alias")
        if id(node) in done:
            return done[id(node)]
        above.add(id(node))
        if isinstance(node, yaml.MappingNode):
            parts = [measure(part) for pair in node.value for part in pair]
        elif isinstance(node, yaml.SequenceNode):
            parts = [measure(part) for part in node.value]
        else:
            parts = [(len(node.value) // 64, 0)]
        above.remove(id(node))
        size, height = 1 + sum(part[0] for part in parts), 1 + max((part[1] for part in parts), default=0)
        if size > MAX_NODES:
            raise yaml.YAMLError(f"the document expands to more than {MAX_NODES:,} values")
        if height > MAX_DEPTH:
            raise yaml.YAMLError(f"the document is nested more than {MAX_DEPTH} levels deep")
        done[id(node)] = size, height
        return size, height

    measure(root)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        ConfigError: the file does not exist, is not YAML, or does not hold a mapping.
    """
    try:
        values = parse_yaml(read_bounded(path, MAX_BYTES))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds {type(values).__name__}, expected keys with values (model:, task:, …).")
    return values


def apply_overrides(values: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Sets `dotted.key=value` overrides in a copy of nested mappings, and then resolves all references.

    Args:
        values: nested mappings.
        overrides: `dotted.key=value`; each value is read as YAML.

    Raises:
        ConfigError: an override has no `=`, an empty key, a value that is not YAML, or a path through a value that is
            not a mapping; or a reference does not name the value of another key. The message lists all errors.
    """
    result, wrong = deepcopy(dict(values)), []
    for override in overrides:
        key, equals, text = override.partition("=")
        parts = key.strip().split(".")
        if not equals or not all(parts):
            wrong.append(f"{override[:200]!r}: expected key=value, as in training.lr=3e-4")
            continue
        try:
            value = parse_yaml(text)
        except yaml.YAMLError as error:
            wrong.append(f"{override!r}: the value is not YAML ({' '.join(str(error).split())})")
            continue
        # not OmegaConf.update(): it silently replaces a value without keys, such as model.name, by a mapping
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
    message = _list_errors("Wrong overrides", wrong) + _list_errors("Wrong references", wrong_references(result))
    if message:
        raise ConfigError("\n".join(message))
    try:
        return resolve_references(result)
    except ValueError as error:
        raise ConfigError(f"The references cannot be resolved: {error}") from error


def _list_errors(heading: str, lines: Sequence[str]) -> list[str]:
    return [f"{heading}:", *(f"  {line[:400]}" for line in lines)] if lines else []


def dump_yaml(values: Mapping[str, Any]) -> str:
    """The values as YAML, keys in the given order. A value that looks like a reference is written as plain text."""
    return yaml.safe_dump(escape_references(values), sort_keys=False, allow_unicode=True, width=120)
