"""Regular expressions of strangers: is the time that one takes bounded by a small power of what it is matched with?

Python's engine tries alternatives one after another. A repeat within a repeat, ``(a+)+$``, takes 2ⁿ steps on n
characters that do not match, and k repeats side by side, ``.*.*.*``, nᵏ. The names that PEFT matches have about a
hundred characters.

The package regex has a timeout, which does not help here: PEFT matches by ``re``, which has none. A trial by regex
does not tell how long ``re`` will take either: on ``model.layers.0.self_attn.q_proj``, the pattern ``(.*)*x`` takes
regex a thousandth of a second, and ``re`` longer than anybody waits.
"""

from __future__ import annotations

import re
import warnings
from typing import Any

try:  # there is no public way to see how a pattern is read
    from re import _constants, _parser  # type: ignore[attr-defined]  # not in typeshed
except ImportError:  # Python 3.10
    import sre_constants as _constants
    import sre_parse as _parser

MAX_LENGTH = 100_000
MAX_REPEATS = 4
"""Open-ended repeats that follow each other; PEFT puts one more in front."""
_LONG = 64
"""A repeat of at most so many times, of something that does not repeat, is no danger."""


def check_pattern(what: str, pattern: str) -> None:
    """Raises ValueError for a pattern that is none, or could take very long; ``what`` names it in the message."""
    try:
        _check(pattern)
    except ValueError as error:
        raise ValueError(f"{what}: the pattern {pattern[:80]!r} {error}") from None


def _check(pattern: str) -> None:
    if len(pattern) > MAX_LENGTH:
        raise ValueError(f"has {len(pattern):,} characters, at most {MAX_LENGTH:,} are read")
    if re.fullmatch(r"[\w.^$\\-]*", pattern) and not re.search(r"\\[1-9]", pattern):
        return _compile(pattern)  # a name: nothing in it repeats
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = _parser.parse(pattern)
    except (re.error, RecursionError, OverflowError, ValueError) as error:
        raise ValueError(f"cannot be read: {error}") from error
    if _repeats(tree, inside=False) > MAX_REPEATS:
        raise ValueError(f"has more than {MAX_REPEATS} open-ended repeats, which can take very long: name the modules")
    return _compile(pattern)


def _compile(pattern: str) -> None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            re.compile(rf"(.*\.)?({pattern})$")  # as PEFT does
    except (re.error, RecursionError, OverflowError, ValueError) as error:
        raise ValueError(f"cannot be read: {error}") from error


def _repeats(tree: Any, *, inside: bool) -> int:
    """How many open-ended repeats one match can go through. Raises ValueError for what can take exponentially long."""
    count = 0
    for operator, argument in tree:
        if operator in (_constants.MAX_REPEAT, _constants.MIN_REPEAT):
            _, most, body = argument
            if inside:
                raise ValueError("has a repeat within a repeat, which can take very long: name the modules")
            open_ended = most == _constants.MAXREPEAT or most > _LONG
            within = _repeats(body, inside=open_ended or most > 1)
            count += int(open_ended) + within
        elif operator is _constants.BRANCH:
            if inside:
                raise ValueError("has alternatives within a repeat, which can take very long: name the modules")
            count += max(_repeats(branch, inside=inside) for branch in argument[1])
        elif operator is _constants.SUBPATTERN:
            count += _repeats(argument[-1], inside=inside)
        elif operator in (_constants.ASSERT, _constants.ASSERT_NOT):
            count += _repeats(argument[1], inside=inside)
        elif operator in (_constants.GROUPREF, _constants.GROUPREF_EXISTS):
            raise ValueError("refers back to a group, which is not read: name the modules")
        elif str(operator) in ("ATOMIC_GROUP", "POSSESSIVE_REPEAT"):
            raise ValueError("has an atomic group or a possessive repeat, which is not read: name the modules")
    return count
