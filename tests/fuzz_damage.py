"""Ways to damage a file: its bytes, or the values in it."""

from __future__ import annotations

import random
from typing import Any

import torch

ODD: list[Any] = [
    None,
    True,
    False,
    0,
    -1,
    1,
    2,
    3,
    0.5,
    -0.0,
    1e308,
    float("nan"),
    float("inf"),
    -float("inf"),
    2**31,
    2**63,
    -(2**63) - 1,
    10**30,
    "",
    "0",
    "nan",
    "a" * 5000,
    "../../outside",
    "/",
    "\x00",
    "\ud7ff\U0001f600",
    ".*",
    "(a+)+$",
    "(",
    "^(.*)*(.*)*x$",
    "none",
    "auto",
    [],
    {},
    [[]],
    [None],
    {"": {}},
    [0, -1],
    ["a", 1, None],
    {"a": {"a": {"a": 1}}},
]


def damage_bytes(draw: random.Random, data: bytes, tokens: list[bytes]) -> bytes:
    """One to four changes: bits, bytes, cuts, repeats, and words that parsers know."""
    changed = bytearray(data)
    for _ in range(draw.randint(1, 4)):
        where = draw.randrange(len(changed) + 1)
        length = draw.choice([1, 1, 2, 4, 8, 40, 300])
        kind = draw.randrange(7)
        if kind == 0 and where < len(changed):
            changed[where] ^= 1 << draw.randrange(8)
        elif kind == 1:
            changed[where : where + length] = bytes(draw.randrange(256) for _ in range(min(length, 8)))
        elif kind == 2:
            del changed[where : where + length]
        elif kind == 3:
            changed[where:where] = changed[where : where + length] * draw.choice([1, 2, 20])
        elif kind == 4:
            del changed[where:]
        elif kind == 5:
            changed[where:where] = draw.choice(tokens)
        else:
            source = draw.randrange(len(changed) + 1)
            changed[where : where + length] = changed[source : source + length]
    return bytes(changed[:1_500_000])


def damage_value(draw: random.Random, value: Any) -> Any:
    """A copy with one to three parts replaced, removed, doubled, nested or exchanged."""
    for _ in range(draw.randint(1, 3)):
        value = _change(draw, value)
    return value


def _change(draw: random.Random, value: Any) -> Any:
    inside = isinstance(value, dict | list | tuple) and len(value) > 0
    if inside and draw.random() < 0.85:
        if isinstance(value, dict):
            key = draw.choice(list(value))
            copy: Any = dict(value)
            kind = draw.randrange(12)
            if kind == 0:
                del copy[key]
            elif kind == 1:
                copy[draw.choice(["", "x", 1, str(key) + "x", "../x", "r", "state", *map(str, value)])] = copy[key]
            elif kind == 2:
                copy[key] = copy[draw.choice(list(value))]
            else:
                copy[key] = _change(draw, copy[key])
            return copy
        copy = list(value)
        index, kind = draw.randrange(len(copy)), draw.randrange(10)
        if kind == 0:
            del copy[index]
        elif kind == 1:
            copy[index:index] = copy[index : index + 1] * draw.choice([1, 3, 2000])
        else:
            copy[index] = _change(draw, copy[index])
        return tuple(copy) if isinstance(value, tuple) else copy
    if isinstance(value, torch.Tensor) and draw.random() < 0.8:
        return _change_tensor(draw, value)
    if isinstance(value, bool) or value is None or inside or draw.random() < 0.5:
        return draw.choice(ODD)
    if isinstance(value, int | float):
        return draw.choice([value + 1, value - 1, -value, value * 1000, value * 1e300, value / 2, str(value)])
    if isinstance(value, str):
        return draw.choice([value + "x", value[: len(value) // 2], value * 50, value.upper(), [value], {value: value}])
    return draw.choice(ODD)


def _change_tensor(draw: random.Random, value: torch.Tensor) -> Any:
    kind = draw.randrange(9)
    if kind == 0:
        return value.new_zeros([*value.shape, 1])
    if kind == 1:
        return value[: max(0, len(value) - 1)] if value.dim() else value.reshape(1)
    if kind == 2:
        return value.to(draw.choice([torch.float64, torch.float16, torch.int64, torch.bool, torch.complex64]))
    if kind == 3:
        return torch.full_like(value, float("nan")) if value.is_floating_point() else value * 0 - 1
    if kind == 4:
        return torch.full_like(value, float("inf")) if value.is_floating_point() else value * 0 + 2**40
    if kind == 5:
        return value.new_zeros(0)
    if kind == 6:
        return value.new_zeros(()).expand(10**6)  # one number that says it is many
    if kind == 7:
        return value.tolist() if value.numel() < 1000 else None
    return -value if value.dtype != torch.bool else ~value
