"""Settings of methods, checked against the types and ranges of their declarations.

    @settings(raises=ScheduleError)
    class ALoRASensi(RoundAllocator):
        beta1: Annotated[float, Field(gt=0, lt=1)] = 0.85

makes a frozen dataclass. Pydantic checks the type and the range of each field when an object is created. The JSON
schema of a recipe has the same bounds. Conditions between fields are checked in ``__post_init__``. One error lists all
wrong settings, each as in ``ALoRASensi(beta1=2): expected a number above 0 and below 1``.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

import pydantic.dataclasses
from pydantic import ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo
from typing_extensions import dataclass_transform

from lorank.errors import BudgetError, LorankError

T = TypeVar("T")

_CONFIG = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
"""Strict: for an integer field, 2.5, "8" and True are errors."""
_KINDS = {bool: "True or False", int: "a whole number", float: "a number", str: "text"}
_BOUNDS = {"gt": "above", "ge": "of at least", "lt": "below", "le": "at most"}
_ENTRY = re.compile(r"^    (\w+): (.*(?:\n {8}.*)*)", re.MULTILINE)
_ROLE = re.compile(r":\w+:`~?(?:\w+\.)*(\w+)`")
MAX_SHOWN = 80
"""The most characters of a wrong value that a message shows."""


@dataclass_transform(frozen_default=True, field_specifiers=(dataclasses.field, Field))
def settings(*, raises: type[LorankError]) -> Callable[[type[T]], type[T]]:
    """A decorator that makes a frozen dataclass with checked fields.

    Args:
        raises: the error type for wrong settings. If only budgets are wrong, a BudgetError is raised instead.
    """

    def decorate(cls: type[T]) -> type[T]:
        made: Any = pydantic.dataclasses.dataclass(cls, frozen=True, config=_CONFIG)
        check: Callable[..., None] = made.__init__

        @functools.wraps(check)
        def init(self: Any, *args: Any, **kwargs: Any) -> None:
            try:
                check(self, *args, **kwargs)
            except ValidationError as error:
                raise _translated(error, made, raises) from None

        made.__init__ = init
        return made  # type: ignore[no-any-return]  # the class cls, as pydantic made it

    return decorate


def documented_settings(cls: type) -> dict[str, str]:
    """The description of each setting, by name, from ``Args`` in the docstrings of a class and its bases."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        _, _, arguments = inspect.cleandoc(base.__doc__ or "").partition("\nArgs:\n")
        for entry in _ENTRY.finditer(arguments.split("\n\n")[0]):
            found[entry[1]] = _ROLE.sub(r"\1", " ".join(entry[2].split())).replace("``", "`")
    return found


def _translated(error: ValidationError, made: Any, raises: type[LorankError]) -> LorankError:
    details = error.errors(include_url=False)
    lines = [_line(detail, made) for detail in details]
    kind = BudgetError if all(isinstance(_cause(detail), BudgetError) for detail in details) else raises
    if len(lines) == 1:
        return kind(lines[0])
    return kind("\n  ".join([f"{len(lines)} settings of {made.__name__} are wrong", *lines]))


def _line(detail: Any, made: Any) -> str:
    fields: Mapping[str, FieldInfo] = made.__pydantic_fields__
    cause = _cause(detail)
    if isinstance(cause, LorankError):
        return str(cause)
    place = [*detail["loc"]] or [""]
    name = list(fields)[place[0]] if isinstance(place[0], int) and place[0] < len(fields) else str(place[0])
    kind, value = detail["type"], _shown(detail["input"])
    if kind == "unexpected_keyword_argument":
        near = get_close_matches(name, fields, n=1)
        known = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(fields)}"
        return f"{made.__name__}({name}={value}): unknown setting; {known}"
    if kind == "unexpected_positional_argument":
        return f"{made.__name__}(…, {value}): expected at most {len(fields)} settings: {', '.join(fields)}"
    if name not in fields:  # the error concerns the whole object
        return f"{made.__name__}: {cause or detail['msg']}"
    wanted = _expected(fields[name]) if len(place) == 1 else None
    if kind == "missing":
        return f"{made.__name__}(): {name} is missing, expected {wanted or 'a value'}"
    where = ".".join([name, *map(str, place[1:])])
    wrong = f"expected {wanted}" if wanted else detail["msg"].replace("Input should be", "expected", 1)
    return f"{made.__name__}({where}={value}): {cause or wrong}"


def _expected(field: FieldInfo) -> str | None:
    """The expected value of a field, in words, from its type and its bounds. None: use pydantic's own message."""
    kind: Any = field.annotation
    kinds = list(get_args(kind)) if get_origin(kind) in (Union, UnionType) else [kind]
    optional = NoneType in kinds
    kinds = [one for one in kinds if one is not NoneType]
    if len(kinds) == 1 and get_origin(kinds[0]) is Literal:
        words = f"one of {', '.join(map(str, get_args(kinds[0])))}"
    elif len(kinds) == 1 and kinds[0] in _KINDS:
        bounds = [f"{word} {getattr(m, b):g}" for m in field.metadata for b, word in _BOUNDS.items() if hasattr(m, b)]
        words = " ".join([_KINDS[kinds[0]], " and ".join(bounds)]).rstrip()
    else:
        return None
    return f"{words}, or None" if optional else words


def _cause(detail: Any) -> Exception | None:
    """The error that one of our own validators raised, or None."""
    cause = detail.get("ctx", {}).get("error")
    return cause if isinstance(cause, Exception) else None


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= MAX_SHOWN else f"{text[: MAX_SHOWN - 1]}…"
