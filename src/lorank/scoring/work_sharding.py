"""Scoring distributed over processes that hold the same model: each evaluates some of the ranks, all get all scores.

How processes communicate is defined elsewhere: the caller passes a :class:`Share`. The functions of this package
distribute their work by position, which is the same in every process, because model and batch are the same. One gather
exchanges the results.
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
        index: the index of this process, 0 ≤ index < count.
        count: the number of processes. All hold the same model and the same batch, and call the same scorer.
    """

    @property
    def index(self) -> int: ...

    @property
    def count(self) -> int: ...

    def gather(self, values: Tensor) -> Tensor:
        """The values of all processes, (count, n) float64 on the CPU, row i from process i; equal in all processes.

        Waits for all processes, so each must call it equally often. It must transfer every value bitwise unchanged.

        Args:
            values: (n,) float64 on the CPU, with the same n in every process.
        """
        ...


def own_items(items: Sequence[T], share: Share | None) -> list[T]:
    """This process's items: every ``count``-th. Neighbours cost about the same, so the work is even."""
    return list(items) if share is None else list(items[share.index :: share.count])


def exchange(own: Callable[[], Sequence[float]], length: int, share: Share | None) -> Tensor:
    """The result of ``own()`` in every process, (count, length) float64; without a share (1, length).

    If ``own()`` fails in one process, this process still takes part in the gather, so that the others do not wait
    forever. Then it raises its error. The other processes raise an error that names the failed process.

    Args:
        own: computes this process's values, at most ``length``; the rest of its row is filled with zeros.

    Raises:
        Exception: the error of ``own()`` in this process.
        LorankError: ``own()`` has failed in another process.
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
            f"scoring failed in process {', '.join(map(str, failed))} of {share.count}; the error message of that "
            "process gives the reason. No rank was moved in any process"
        )
    return rows[:, 1:]


def restore_order(rows: Tensor, total: int) -> Tensor:
    """The results of all processes in the order of the items: (count, ⌈total / count⌉) → (total,)."""
    return rows.T.reshape(-1)[:total]  # item i belongs to process i % count, as its (i // count)-th item


def largest_share(total: int, share: Share | None) -> int:
    """The largest number of items of one process, out of ``total``. Every row is padded to this length."""
    return total if share is None else -(-total // share.count)
