"""Threads that stand in for processes: all call one function, and exchange values through their group."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any

import torch
from torch import Tensor


class ThreadGroup:
    """What code needs of :class:`lorank.training.parallel.process_group.ProcessGroup`, between threads."""

    several = True
    device = torch.device("cpu")

    def __init__(self, index: int, parts: list[Any], barrier: Barrier) -> None:
        self.index, self.count = index, len(parts)
        self._parts, self._barrier = parts, barrier

    def gather_objects(self, value: Any) -> list[Any]:
        self._parts[self.index] = value
        self._barrier.wait()
        found = list(self._parts)
        self._barrier.wait()  # nobody writes the next values before all have read these
        return found

    def gather(self, values: Tensor) -> Tensor:
        return torch.stack(self.gather_objects(values.clone()))

    def mean_(self, tensor: Tensor) -> Tensor:
        return tensor.copy_(self.gather(tensor).mean(0))


def together(work: Callable[[Any], Any], count: int = 2) -> list[Any]:
    """What ``work`` returned, or the error that it raised, in each of the threads."""
    parts, barrier = [None] * count, Barrier(count, timeout=60)

    def one(index: int) -> Any:
        try:
            return work(ThreadGroup(index, parts, barrier))
        except Exception as error:
            return error

    with ThreadPoolExecutor(count) as threads:
        return list(threads.map(one, range(count)))
