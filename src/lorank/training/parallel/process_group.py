"""The processes that train one model, and the few operations by which they communicate."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lorank.lora import AdapterLayers


@dataclass(frozen=True)
class ProcessGroup:
    """The processes of the default process group; without one, this process only.

    Args:
        count: the number of processes. ≥ 1.
        index: the index of this process, from 0.
        device: the device of exchanged tensors, as the group's backend expects it: that of the adapter.
    """

    count: int = 1
    index: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @classmethod
    def of(cls, layers: AdapterLayers) -> ProcessGroup:
        """The processes that train these layers."""
        return cls.current(next(iter(layers.values())).A.device)

    @classmethod
    def current(cls, device: torch.device) -> ProcessGroup:
        """The processes of the present default process group."""
        if not _is_initialized():
            return cls()
        return cls(dist.get_world_size(), dist.get_rank(), device)

    @property
    def several(self) -> bool:
        return self.count > 1

    def mean_(self, tensor: Tensor) -> Tensor:
        """Replaces ``tensor`` by its mean over the processes, in place. All processes get bitwise the same result."""
        if self.several:
            dist.all_reduce(tensor)  # a sum, because not every backend has a mean
            tensor.div_(self.count)
        return tensor

    def gather(self, values: Tensor) -> Tensor:
        """Gathers (n,) of each process to (count, n), row i from process i (see :class:`lorank.scoring.Share`)."""
        if not self.several:
            return values.unsqueeze(0)
        own = values.to(self.device).contiguous()
        parts = [torch.empty_like(own) for _ in range(self.count)]
        dist.all_gather(parts, own)
        return torch.stack(parts).to(values.device)

    def barrier(self) -> None:
        """Waits until all processes have called this method."""
        self.gather(torch.zeros(1))

    def lockstep(self) -> Lockstep:
        """The share for a model whose forward pass needs all processes at once: each process does all the work."""
        return Lockstep(self)

    def gather_objects(self, value: Any) -> list[Any]:
        """Gathers a small Python object of each process, for error messages."""
        if not self.several:
            return [value]
        parts: list[Any] = [None] * self.count
        dist.all_gather_object(parts, value)
        return parts


@dataclass(frozen=True)
class Lockstep:
    """A :class:`lorank.scoring.Share` in which every process does all the work.

    If parameters are sharded, a forward pass needs all processes, so all of them run the same passes at the same time.
    The results may differ in the last bits between GPUs, so all processes use the mean.
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
