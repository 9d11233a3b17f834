"""The schema and the seal of a rank state: a damaged state is refused before anything has changed.

A rank state is saved inside the optimiser's file. It is sealed with a SHA-256 of its content. When it is loaded, the
seal is checked, and that no field is missing or of another type. The seal detects damage, not manipulation.
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


class _Schema(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", arbitrary_types_allowed=True)


class _Heads(_Schema):
    kind: Literal["rows", "columns"]
    count: PositiveInt
    size: PositiveInt
    ranks: list[NonNegativeInt]


class _Gated(_Schema):
    gates: Tensor
    B: dict[str, Tensor]


class _State(_Schema):
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
    first_lr: float
    highest_lr: float
    state: dict[str, Tensor]


_SCHEMA = TypeAdapter(_State)


def sealed(state: Mapping[str, Any]) -> dict[str, Any]:
    """The state with its seal."""
    return {**state, SEAL: _digest(state)}


def check_seal(state: Mapping[str, Any]) -> None:
    """Raises ResumeError if the state differs from what was sealed, or does not fit the schema."""
    content = {key: value for key, value in state.items() if key != SEAL}
    try:
        intact = state.get(SEAL) == _digest(content)
    except (TypeError, ValueError, RecursionError):
        intact = False
    if not intact:
        raise ResumeError(f"the saved rank state has changed since it was written (its SHA-256 differs): {_REMEDY}")
    try:
        _SCHEMA.validate_python(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"][:3]))[:100]
        raise ResumeError(f"the saved rank state cannot be read, at {where!r} ({first['type']}): {_REMEDY}") from error


def _digest(state: Mapping[str, Any]) -> str:
    sha256 = hashlib.sha256()
    _update_hash(sha256, state)
    return sha256.hexdigest()


def _update_hash(sha256: Any, value: Any) -> None:
    """Hashes a value by type, length and content. A tuple counts as a list, because some formats save it as one."""
    if isinstance(value, Tensor):
        sha256.update(f"tensor {value.dtype} {tuple(value.shape)}:".encode())
        sha256.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    elif isinstance(value, Mapping):
        sha256.update(f"mapping {len(value)}:".encode())
        for key in sorted(value):
            _update_hash(sha256, key)
            _update_hash(sha256, value[key])
    elif isinstance(value, list | tuple):
        sha256.update(f"list {len(value)}:".encode())
        for item in value:
            _update_hash(sha256, item)
    elif value is None or isinstance(value, bool | int | float | str):
        text = repr(value).encode("utf-8", "surrogatepass")
        sha256.update(f"{type(value).__name__} {len(text)}:".encode() + text)
    else:
        raise TypeError(f"a rank state cannot hold a {type(value).__name__}")
