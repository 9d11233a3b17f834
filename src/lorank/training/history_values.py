"""The values of one line of a rank history, checked: a file may be old, cut short, or a stranger's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

MAX_RANK = 1 << 24
"""Above any rank and any width that a layer has: larger numbers come from a damaged file."""


def checked(values: Any) -> dict[str, Any]:
    """The fields of a :class:`~lorank.training.history.Record`, with what is unknown left out.

    Raises:
        ValueError: something is missing or is not what :meth:`Record.to_json` writes; names it.
    """
    _require(isinstance(values, Mapping), "a mapping", values)
    for name in ("step", "method", "ranks"):
        if name not in values:
            raise ValueError(f"{name} is missing")
    found = {name: values[name] for name in _CHECKS if name in values}
    for name, value in found.items():
        try:
            _CHECKS[name](value)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    differing = set(found["ranks"]) ^ set(found.get("shapes", {}))
    if differing:
        raise ValueError(f"ranks and shapes are not of the same modules: {min(differing)[:80]!r}")
    return found


def _count(value: Any) -> None:
    _require(isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_RANK, "a whole number", value)


def _step(value: Any) -> None:
    _require(isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63, "a whole number", value)


def _number(value: Any) -> None:
    _require(isinstance(value, int | float) and not isinstance(value, bool), "a number", value)


def _text(value: Any) -> None:
    _require(isinstance(value, str), "text", value)


def _shape(value: Any) -> None:
    _require(isinstance(value, list | tuple) and len(value) == 2, "(d_in, d_out)", value)
    for length in value:
        _count(length)


def _list_of(check: Callable[[Any], None]) -> Callable[[Any], None]:
    def each(value: Any) -> None:
        _require(isinstance(value, list | tuple), "a list", value)
        for part in value:
            check(part)

    return each


def _by_module(check: Callable[[Any], None]) -> Callable[[Any], None]:
    def each(value: Any) -> None:
        _require(isinstance(value, Mapping), "a mapping from modules", value)
        for name, part in value.items():
            try:
                check(part)
            except ValueError as error:
                raise ValueError(f"{name[:80]}: {error}") from None

    return each


def _mapping(value: Any) -> None:
    _require(isinstance(value, Mapping), "a mapping", value)


def _require(right: bool, expected: str, value: Any) -> None:
    if not right:
        shown = repr(value) if isinstance(value, str | float | bool | None) else type(value).__name__
        raise ValueError(f"expected {expected}, got {shown[:80]}")


_CHECKS: Mapping[str, Callable[[Any], None]] = {
    "step": _step,
    "method": _text,
    "ranks": _by_module(_count),
    "shapes": _by_module(_shape),
    "pruned": _by_module(_list_of(_count)),
    "added": _by_module(_count),
    "scores": _by_module(_list_of(_number)),
    "seconds": _number,
    "details": _mapping,
    "active": _by_module(_count),
}
