"""Several processes that train one model together: how many they are, and the little that they tell each other."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lorank.lora import AdapterLayers


@dataclass(frozen=True)
class ProcessGroup:
    """The processes of the default process group. One, where there is none.

    Args:
        count: how many there are.
        index: which one this is, from 0.
        device: where the group's backend expects what they exchange: where the adapter is.
    """

    count: int = 1
    index: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @classmethod
    def of(cls, layers: AdapterLayers) -> ProcessGroup:
        """Those that train these layers."""
        return cls.now(next(iter(layers.values())).A.device)

    @classmethod
    def now(cls, device: torch.device) -> ProcessGroup:
        """Those that there are now."""
        if not _is_initialized():
            return cls()
        return cls(dist.get_world_size(), dist.get_rank(), device)

    @property
    def several(self) -> bool:
        return self.count > 1

    def mean_(self, tensor: Tensor) -> Tensor:
        """In place, the mean of what each process has, alike in all of them to the last bit."""
        if self.several:
            dist.all_reduce(tensor)  # a sum: not every backend has a mean
            tensor.div_(self.count)
        return tensor

    def gather(self, values: Tensor) -> Tensor:
        """(n,) of each process → (count, n), row i from process i: :class:`lorank.scoring.Share`."""
        if not self.several:
            return values.unsqueeze(0)
        own = values.to(self.device).contiguous()
        parts = [torch.empty_like(own) for _ in range(self.count)]
        dist.all_gather(parts, own)
        return torch.stack(parts).to(values.device)

    def wait(self) -> None:
        """Returns when all processes have called it."""
        self.gather(torch.zeros(1))

    def lockstep(self) -> Lockstep:
        """For a model that only runs in all processes at once: every one of them does all the work."""
        return Lockstep(self)

    def gather_objects(self, value: Any) -> list[Any]:
        """Small Python objects, one of each process; for messages."""
        if not self.several:
            return [value]
        parts: list[Any] = [None] * self.count
        dist.all_gather_object(parts, value)
        return parts


@dataclass(frozen=True)
class Lockstep:
    """A :class:`lorank.scoring.Share` that is everything, in every process.

    Where parameters are sharded, a forward pass needs all processes, so they run the same ones at the same time. What
    they find may differ in its last bits between GPUs; all go on with the mean.
    """

    processes: ProcessGroup
    count: int = 1
    index: int = 0

    def gather(self, values: Tensor) -> Tensor:
        return self.processes.gather(values).mean(0, keepdim=True)  # (1, n)


def is_first_process() -> bool:
    """Whether this is the process that writes files and shows progress: process 0, or the only one."""
    return not _is_initialized() or dist.get_rank() == 0


def _is_initialized() -> bool:
    return dist.is_available() and dist.is_initialized()
