"""Scoring shared out over processes that hold the same model: each evaluates some of the ranks, all get all scores.

Nothing here knows how processes talk. Whoever does gives a :class:`Share`; the methods of this package then deal their
work by position (the same in every process, since model and batch are) and exchange results in one gather.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from lorank.errors import LorankError

T = TypeVar("T")


class Share(Protocol):
    """One process's share of scoring.

    Attributes:
        index: which process this is, 0 ≤ index < count.
        count: how many there are. All hold the same model and the same batch, and call the same scorer.
    """

    @property
    def index(self) -> int: ...

    @property
    def count(self) -> int: ...

    def gather(self, values: Tensor) -> Tensor:
        """What every process gave, (count, n) float64 on the CPU, row i from process i; equal in all of them.

        Waits for all processes: each calls it equally often. It must not change a bit of what it carries.

        Args:
            values: (n,) float64 on the CPU, with the same n in every process.
        """
        ...


def deal_out(items: Sequence[T], share: Share | None) -> list[T]:
    """This process's items: every ``count``-th, so that neighbours, which cost about the same, go to all in turn."""
    return list(items) if share is None else list(items[share.index :: share.count])


def exchange(own: Callable[[], Sequence[float]], length: int, share: Share | None) -> Tensor:
    """``own()`` of every process, (count, length) float64, without a share (1, length).

    A process that fails must not leave the others waiting: it takes part in the gather all the same, and then raises;
    so do the others, with an error that says where it happened.

    Args:
        own: computes this process's numbers, ``length`` of them at most; the rest is filled up with zeros.

    Raises:
        Exception: this process's own.
        LorankError: another process's.
    """
    row = torch.zeros(1 + length, dtype=torch.float64)  # [failed, values …]
    failure: Exception | None = None
    try:
        values = own()
        row[1 : 1 + len(values)] = torch.as_tensor(values, dtype=torch.float64)
    except Exception as error:
        if share is None:
            raise
        failure = error
        row[0] = 1
    if share is None:
        return row[None, 1:]  # (1, length)
    rows = share.gather(row)  # (count, 1 + length)
    if failure is not None:
        raise failure
    failed = rows[:, 0].nonzero().flatten().tolist()
    if failed:
        raise LorankError(
            f"scoring failed in process {', '.join(map(str, failed))} of {share.count}, whose own message says why; no "
            "process has moved a rank"
        )
    return rows[:, 1:]


def in_dealt_order(rows: Tensor, total: int) -> Tensor:
    """Dealt results in the order of the items they belong to: (count, ⌈total / count⌉) → (total,)."""
    return rows.T.reshape(-1)[:total]  # item i was dealt to process i % count, as its (i // count)-th


def largest_share(total: int, share: Share | None) -> int:
    """How many of ``total`` items the process with most of them has: what every row is padded to."""
    return total if share is None else -(-total // share.count)
