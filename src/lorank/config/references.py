r"""References from one key of a configuration to another: `alpha: ${lora.r}`. OmegaConf resolves them. `\${` is a plain
`${`.

A configuration may come from an untrusted source. OmegaConf would also read the environment (`${oc.env:HOME}`), call
any registered resolver, and expand references to references until memory is full. So only one form is allowed, the
dotted name of a key, and the expanded size of all references is computed before OmegaConf reads them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from itertools import islice
from typing import Any

from lorank.extras import require

MAX_RESOLVED = 20_000
"""The largest expanded size of all references of a configuration, in characters and values."""
MAX_CHAIN = 10
"""The largest number of keys in a chain of references."""
MAX_NAMED = 40
"""The largest number of wrong references in one message."""
_START = re.compile(r"(?<!\\)(\\*)\$\{")
_REFERENCE = re.compile(r"\$\{(\w[\w-]*(?:\.\w[\w-]*)*)\}", re.ASCII)


def wrong_references(values: Mapping[str, Any]) -> list[str]:
    """The errors in the references of nested values: one line per error, with the dotted key. Empty if there are none.

    Args:
        values: the configuration, nested mappings and lists.
    """
    measure, wrong, total = _Measure(values), list[str](), 0
    for key, text in _texts(values):
        total += text.count("${")
        for written, name in _references(text):
            if len(wrong) == MAX_NAMED:
                return [*dict.fromkeys(wrong), "…"]
            try:
                if name is None:
                    raise ValueError("only a key can be referred to, as in ${training.lr}; write a plain ${ as \\${")
                total += measure.key(name)[0]
            except ValueError as error:
                wrong.append(f"{key}: {written}: {error}")
            if total > MAX_RESOLVED:
                break
        if total > MAX_RESOLVED:
            return [*dict.fromkeys(wrong), f"{key}: the references expand to more than {MAX_RESOLVED:,} characters"]
    return list(dict.fromkeys(wrong))


def resolve_references(values: Mapping[str, Any]) -> dict[str, Any]:
    r"""Replaces each reference by the value of its key, and each `\${` by `${`, in a copy.

    A value that consists of one reference gets the other value, with its type. A reference inside other text is
    replaced by the value's text.

    Args:
        values: nested values in which `wrong_references` finds no error.

    Raises:
        ValueError: OmegaConf cannot read the values: a key is a date or null.
        MissingPackageError: there are references, and OmegaConf is not installed.
    """
    if not any("${" in text for _, text in _texts(values)):
        return dict(values)
    require("a configuration with references (${…})", "omegaconf")
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        config = OmegaConf.create(dict(values), flags={"allow_objects": True})  # objects: dates, for example
        resolved: Any = OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException as error:
        raise ValueError(str(error).partition("\n")[0]) from error
    return dict(resolved)


def escape_references(value: Any) -> Any:
    r"""Replaces `${` by `\${` in all texts of nested values, in a copy, so that resolving it gives the same values."""
    if isinstance(value, str):
        return _START.sub(lambda found: found[1] * 2 + r"\${", value)
    if isinstance(value, Mapping):
        return {key: escape_references(part) for key, part in value.items()}
    return [escape_references(part) for part in value] if isinstance(value, list) else value


def _references(text: str) -> Iterator[tuple[str, str | None]]:
    r"""Each `${` without a backslash: its text, and the key that it names, or None if it does not name a key."""
    for start in _START.finditer(text):
        if len(start[1]) % 2 == 0:  # \\${ is a backslash and then a reference
            place = start.end() - len("${")
            found = _REFERENCE.match(text, place)
            yield (found[0], found[1]) if found else (_shortened(text[place : place + 60]), None)


def _shortened(text: str) -> str:
    inside, end, _ = text.partition("}")
    return inside + end


def _texts(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Every text in nested values, with its dotted key."""
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, Mapping | list):
        pairs = value.items() if isinstance(value, Mapping) else enumerate(value)
        for name, part in pairs:
            yield from _texts(part, f"{key}.{name}" if key else str(name))


class _Measure:
    """The expanded size of each key. Each key is measured once, so measuring is fast even where resolving would not
    end."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = values
        self._known: dict[str, tuple[int, int]] = {}
        self._chain: list[str] = []

    def key(self, name: str) -> tuple[int, int]:
        """(characters and values, length of the chain of keys); ValueError if the key cannot be resolved."""
        if name in self._chain:
            cycle = [*self._chain[self._chain.index(name) :], name]
            raise ValueError(f"the reference leads back to itself: {' → '.join(cycle)}")
        if name not in self._known and len(self._chain) < MAX_CHAIN:
            self._chain.append(name)
            try:
                size, chain = self._value(self._look_up(name))
            finally:
                self._chain.pop()
            self._known[name] = size, chain + 1
        if name not in self._known or self._known[name][1] > MAX_CHAIN:
            raise ValueError(f"the reference leads through more than {MAX_CHAIN} keys")
        return self._known[name]

    def _value(self, value: Any) -> tuple[int, int]:
        if isinstance(value, str):
            parts = [self.key(name) for _, name in _references(value) if name is not None]
            parts.append((len(value), 0))
        elif isinstance(value, Mapping | list):
            parts = [self._value(part) for part in (value.values() if isinstance(value, Mapping) else value)]
        else:
            parts = []
        return 1 + sum(size for size, _ in parts), max((chain for _, chain in parts), default=0)

    def _look_up(self, name: str) -> Any:
        value: Any = self._values
        for part in name.split("."):
            if not isinstance(value, Mapping) or part not in value:
                known = [key for key in islice(_keys(self._values), 1000) if len(key) < 100]
                near = get_close_matches(name[:100], known, n=1)
                hint = f"did you mean {near[0]}?" if near else "name a key that the file or KEY=VALUE sets"
                raise ValueError(f"there is no such key; {hint}")
            value = value[part]
        if isinstance(value, Mapping):
            raise ValueError(f"{name} is a section; refer to one of its keys: {', '.join(map(str, value))[:200]}")
        return value


def _keys(values: Mapping[Any, Any], above: str = "") -> Iterator[str]:
    """The dotted names of all values."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _keys(value, f"{above}{name}.")
        else:
            yield f"{above}{name}"
