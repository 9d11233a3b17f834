"""A rank state that is damaged is refused before anything has changed.

A state travels inside an optimiser's file. It is sealed with a SHA-256 of all that it says, and its form is checked, so
that no field is missing or of another type. A seal shows damage, not malice.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, TypeAdapter, ValidationError
from torch import Tensor

from lorank.errors import ResumeError

SEAL = "sha256"
_REMEDY = "the file is damaged. Resume from another checkpoint"


class _Form(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", arbitrary_types_allowed=True)


class _Heads(_Form):
    kind: Literal["rows", "columns"]
    count: PositiveInt
    size: PositiveInt
    ranks: list[NonNegativeInt]


class _Gated(_Form):
    gates: Tensor
    B: dict[str, Tensor]


class _State(_Form):
    version: int
    step: NonNegativeInt
    allocations: NonNegativeInt
    allocator: dict[str, Any]
    seed: int
    finished: bool
    initial_ranks: dict[str, NonNegativeInt]
    shapes: dict[str, Annotated[tuple[PositiveInt, PositiveInt], Field(strict=False)]]
    ranks: dict[str, NonNegativeInt]
    heads: dict[str, _Heads]
    gated: _Gated | Annotated[dict[str, Any], Field(max_length=0)]
    base: dict[str, list[int] | list[float]]
    state: dict[str, Tensor]


_FORM = TypeAdapter(_State)


def sealed(state: Mapping[str, Any]) -> dict[str, Any]:
    """The state with its seal."""
    return {**state, SEAL: _digest(state)}


def check_seal(state: Mapping[str, Any]) -> None:
    """Raises ResumeError if the state is not what was sealed, or has not the form of one."""
    said = {key: value for key, value in state.items() if key != SEAL}
    try:
        whole = state.get(SEAL) == _digest(said)
    except (TypeError, ValueError, RecursionError):
        whole = False
    if not whole:
        raise ResumeError(f"the saved rank state is not what was written (its SHA-256 differs): {_REMEDY}")
    try:
        _FORM.validate_python(said)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"][:3]))[:100]
        raise ResumeError(f"the saved rank state cannot be read, at {where!r} ({first['type']}): {_REMEDY}") from error


def _digest(state: Mapping[str, Any]) -> str:
    found = hashlib.sha256()
    _feed(found, state)
    return found.hexdigest()


def _feed(found: Any, value: Any) -> None:
    """Values by type, length and content; a tuple counts as the list that some formats make of it."""
    if isinstance(value, Tensor):
        found.update(f"tensor {value.dtype} {tuple(value.shape)}:".encode())
        found.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    elif isinstance(value, Mapping):
        found.update(f"mapping {len(value)}:".encode())
        for key in sorted(value):
            _feed(found, key)
            _feed(found, value[key])
    elif isinstance(value, list | tuple):
        found.update(f"list {len(value)}:".encode())
        for item in value:
            _feed(found, item)
    elif value is None or isinstance(value, bool | int | float | str):
        text = repr(value).encode("utf-8", "surrogatepass")
        found.update(f"{type(value).__name__} {len(text)}:".encode() + text)
    else:
        raise TypeError(f"a rank state holds no {type(value).__name__}")
