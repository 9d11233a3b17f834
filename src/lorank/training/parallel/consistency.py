"""Do all processes have the same? Compared by hashes, after every reallocation: ranks that drifted apart are silent.

A tensor's hash is made of its bits where they are, on a GPU too:

    h = Σ_i b_i · w_i  mod 2⁶⁴        w_i odd, from i by a fixed multiplier

Whole numbers are added without rounding, so the order does not matter. It is no protection from an adversary, who is
not what is looked for here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

from lorank.errors import DisagreementError
from lorank.training.parallel.process_group import ProcessGroup

_GOLDEN = 0x9E3779B97F4A7C15 - 2**64  # as a signed number of 64 bits
_MIX = 0xBF58476D1CE4E5B9 - 2**64
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def digest(tensor: Tensor) -> Tensor:
    """A hash of the bits of ``tensor``: () int64, on its device."""
    flat = tensor.detach().contiguous().reshape(-1)
    if flat.is_complex():
        flat = torch.view_as_real(flat).reshape(-1)
    bits = flat.view(_INTEGERS[flat.element_size()]).long()
    weights = torch.arange(1, len(bits) + 1, device=bits.device) * _GOLDEN
    weights = ((weights ^ (weights >> 29)) * _MIX) | 1
    return (bits * weights).sum() + len(bits)


def require_same_text(processes: ProcessGroup, text: str, what: str, advice: str) -> None:
    """Compares a few lines of text, ``name: value`` each.

    Args:
        what: what they describe, for the message: "the processes do not have the same …".
        advice: what to do.

    Raises:
        DisagreementError: they differ; names the first line that does, in this process and in one that differs.
    """
    if not processes.several:
        return
    own = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big", signed=True)
    hashes = processes.gather(torch.tensor([own]))  # (processes, 1), alike in all of them
    if bool((hashes == hashes[0]).all()):
        return
    texts = processes.gather_objects(text)
    other = next(index for index, theirs in enumerate(texts) if theirs != texts[0])
    first, second = _first_difference(texts[0], texts[other])
    raise DisagreementError(
        f"the processes do not have the same {what}: process 0 has {first!r}, process {other} has {second!r}. {advice}"
    )


def require_same_tensors(processes: ProcessGroup, tensors: Mapping[str, Tensor], what: str, advice: str) -> None:
    """Compares tensors by their names, shapes, types and bits; arguments as of :func:`require_same_text`.

    Raises:
        DisagreementError: they differ; names the first that does.
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
            f"the processes do not have the same {what}: {list(tensors)[index]} in process {other} is not that of "
            f"process 0 ({count} of {len(tensors)} tensors differ). {advice}"
        )


def _first_difference(first: str, second: str) -> tuple[str, str]:
    ours, theirs = first.splitlines(), second.splitlines()
    longest = max(len(ours), len(theirs))
    ours, theirs = ([*lines, *["nothing"] * (longest - len(lines))] for lines in (ours, theirs))
    return next((a, b) for a, b in zip(ours, theirs, strict=True) if a != b)
