"""YAML in and out, `dotted.key=value` overrides, and references (`${training.lr}`) as the last step of reading.

Configurations are passed around, so a file may be a stranger's: the safe loader, which makes plain values only, and
bounds on size, depth and on what aliases come to when they are written out, before anything is made of them.
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
"""Values in a document, aliases written out: a few aliases of aliases stand for more than fits in memory."""
MAX_DEPTH = 50


class _UniqueKeys(yaml.SafeLoader):
    """PyYAML's safe loader, which by itself lets a repeated key silently win over the first."""

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
    """One YAML document, safely; raises yaml.YAMLError, whatever is wrong with it."""
    loader = _UniqueKeys(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _check_size(node)
        return loader.construct_document(node)
    except RecursionError as error:
        raise yaml.YAMLError("it is nested too deeply") from error
    except yaml.YAMLError:
        raise
    except Exception as error:  # PyYAML's own, of any kind: !!timestamp of something else, a date that cannot be
        raise yaml.YAMLError(f"a value cannot be read ({type(error).__name__}: {error})") from error
    finally:
        loader.dispose()


def _check_size(root: yaml.Node) -> None:
    """Raises yaml.YAMLError for what is nested too deeply or, with its aliases written out, too large."""
    done: dict[int, tuple[int, int]] = {}  # size and height of each node: an alias is the same node again
    above: set[int] = set()

    def measure(node: yaml.Node) -> tuple[int, int]:
        if id(node) in above:
            raise yaml.YAMLError("an alias refers to what it is a part of")
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
            raise yaml.YAMLError(f"it comes to more than {MAX_NODES:,} values")
        if height > MAX_DEPTH:
            raise yaml.YAMLError(f"it is nested more than {MAX_DEPTH} levels deep")
        done[id(node)] = size, height
        return size, height

    measure(root)


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file that holds a mapping.

    Raises:
        ConfigError: it is not there, not YAML, or holds something else.
    """
    try:
        values = parse_yaml(read_bounded(path, MAX_BYTES))
    except FileNotFoundError as error:
        raise ConfigError(
            f"{path}: there is no such file. Give a recipe (recipes/e2e_alora.yaml) or a YAML file of your own."
        ) from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds {type(values).__name__}, expected keys with values (model:, task:, …).")
    return values


def apply_overrides(values: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """A copy of nested mappings with `dotted.key=value` put in, values read as YAML, and then all references resolved.

    Raises:
        ConfigError: one or more overrides have no `=`, an empty key, a value that is not YAML, or a path that leads
            through something that is not a mapping; or a reference is not one to a value of another key. All of them
            are named.
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
        # not OmegaConf.update(): it replaces a value that has no keys, such as model.name, by a mapping, without a word
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
    told = _told("Wrong overrides", wrong) + _told("Wrong references", wrong_references(result))
    if told:
        raise ConfigError("\n".join(told))
    try:
        return resolve_references(result)
    except ValueError as error:
        raise ConfigError(f"The references cannot be resolved: {error}") from error


def _told(heading: str, lines: Sequence[str]) -> list[str]:
    return [f"{heading}:", *(f"  {line[:400]}" for line in lines)] if lines else []


def dump_yaml(values: Mapping[str, Any]) -> str:
    """YAML in the given order of keys; what looks like a reference in a value is written as plain text."""
    return yaml.safe_dump(escape_references(values), sort_keys=False, allow_unicode=True, width=120)
