"""An extension of griffe: references in Sphinx's form in docstrings (``:class:`~lorank.Budget```) become code."""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Object

_ROLE = re.compile(r":\w+:`(?P<short>~?)(?P<name>[^`<]+?)(?:\s*<[^`>]+>)?`")


def _as_code(found: re.Match[str]) -> str:
    name = found["name"]
    return f"`{name.rpartition('.')[2] if found['short'] else name}`"


class Roles(Extension):
    def on_object(self, *, obj: Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = _ROLE.sub(_as_code, obj.docstring.value)
