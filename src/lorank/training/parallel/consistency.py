"""Checks by hashes, after every allocation, that all processes have the same ranks and tensors.

Without this check, processes whose ranks or weights diverge would not be noticed.

The hash of a tensor is computed from its bits on its own device, also on a GPU:

    h = Σ_i b_i · w_i  mod 2⁶⁴        w_i odd, from i by a fixed multiplier

Integers are added without rounding, so the order does not matter. The hash detects accidental differences; it does not
protect against an adversary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

from lorank.errors import DisagreementError
from lorank.training.parallel.process_group import ProcessGroup

_GOLDEN = 0x9E3779B97F4A7C15 - 2**64  # as a signed 64-bit integer
_MIX = 0xBF58476D1CE4E5B9 - 2**64
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def digest(tensor: Tensor) -> Tensor:
    """The hash of the bits of ``tensor``: () int64, on its device."""
    flat = tensor.detach().contiguous().reshape(-1)
    if flat.is_complex():
        flat = torch.view_as_real(flat).reshape(-1)
    bits = flat.view(_INTEGERS[flat.element_size()]).long()
    weights = torch.arange(1, len(bits) + 1, device=bits.device) * _GOLDEN
    weights = ((weights ^ (weights >> 29)) * _MIX) | 1
    return (bits * weights).sum() + len(bits)


def require_same_text(processes: ProcessGroup, text: str, what: str, advice: str) -> None:
    """Checks that all processes have the same text.

    Args:
        processes: the processes to compare.
        text: lines of the form ``name: value``.
        what: the subject of the text, for the error message: "the processes do not have the same …".
        advice: what to do, for the error message.

    Raises:
        DisagreementError: the texts differ. The message quotes the first line that differs, from two processes.
    """
    if not processes.several:
        return
    own = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big", signed=True)
    hashes = processes.gather(torch.tensor([own]))  # (processes, 1), the same in all processes
    if bool((hashes == hashes[0]).all()):
        return
    texts = processes.gather_objects(text)
    other = next(index for index, theirs in enumerate(texts) if theirs != texts[0])
    first, second = _first_difference(texts[0], texts[other])
    raise DisagreementError(
        f"the processes do not have the same {what}: process 0 has {first!r}, process {other} has {second!r}. {advice}"
    )


def require_same_tensors(processes: ProcessGroup, tensors: Mapping[str, Tensor], what: str, advice: str) -> None:
    """Checks that all processes have tensors of the same names, shapes, dtypes and bits.

    Args:
        processes: the processes to compare.
        tensors: the tensors by name.
        what, advice: as in :func:`require_same_text`.

    Raises:
        DisagreementError: the tensors differ. The message names the first tensor that differs.
    """
    if not processes.several:
        return
    names = "\n".join(f"{name}: {tuple(value.shape)} {value.dtype}" for name, value in tensors.items())
    require_same_text(processes, names, what, advice)
    if not tensors:
        return
    own = torch.stack([digest(value).to(processes.device) for value in tensors.values()])  # (n,)
    hashes = processes.gather(own)  # (processes, n)
    differing = (hashes != hashes[0]).nonzero()  # (differences, 2)
    if len(differing):
        other, index = differing[0].tolist()
        count = int((hashes != hashes[0]).any(0).sum())
        raise DisagreementError(
            f"the processes do not have the same {what}: {list(tensors)[index]} differs between process {other} and "
            f"process 0 ({count} of {len(tensors)} tensors differ). {advice}"
        )


def _first_difference(first: str, second: str) -> tuple[str, str]:
    ours, theirs = first.splitlines(), second.splitlines()
    longest = max(len(ours), len(theirs))
    ours, theirs = ([*lines, *["nothing"] * (longest - len(lines))] for lines in (ours, theirs))
    return next((a, b) for a, b in zip(ours, theirs, strict=True) if a != b)
