"""Measuring time and memory side by side in one process.

On a shared machine, or if the clock rate changes, times drift by tens of per cent within minutes. So all contenders run
in turns, and a ratio is the median over the turns of the quotient within one turn. On a CPU with one thread, time is
the processor time of the process: the wall-clock time without other programs.
"""

from __future__ import annotations

import statistics
import time
import weakref
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

MIB = 2**20
Seconds = dict[str, list[float]]
"""Seconds per turn, by contender."""


def seconds_of(run: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call. On a GPU from CUDA events; on a CPU processor time with one thread, else wall-clock time."""
    if device.type == "cuda":
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        began.record()
        run()
        ended.record()
        ended.synchronize()
        return began.elapsed_time(ended) / 1000
    clock = time.process_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    run()
    return clock() - start


def interleaved(
    runs: Mapping[str, Callable[[], object]], turns: int, device: torch.device, *, warm_up: int = 1
) -> Seconds:
    """Calls every run once per turn. Each turn starts with the next run, so that no run is always first."""
    names = list(runs)
    for _ in range(warm_up):
        for run in runs.values():
            run()
    seconds: Seconds = {name: [] for name in names}
    for turn in range(turns):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            seconds[name].append(seconds_of(runs[name], device))
    return seconds


def ratio(seconds: Seconds, name: str, reference: str) -> float:
    """The median over the turns of the quotient within one turn."""
    return statistics.median(a / b for a, b in zip(seconds[name], seconds[reference], strict=True))


class _Kept:
    """The object that autograd keeps in place of a saved tensor."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor.detach()  # with its graph, an operation that saves its own output is never freed


def saved_mib(model: nn.Module, forward: Callable[[], object]) -> float:
    """Mebibytes that autograd keeps for the backward pass of ``forward``: all distinct storages except the model's own.

    A tensor that is saved and freed again during the forward pass does not count.
    """
    own = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    alive: weakref.WeakSet[_Kept] = weakref.WeakSet()

    def pack(tensor: Tensor) -> _Kept:
        kept = _Kept(tensor)
        alive.add(kept)
        return kept

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.tensor):
        output = forward()
    storages = [kept.tensor.untyped_storage() for kept in alive]
    sizes = {storage.data_ptr(): storage.nbytes() for storage in storages if storage.data_ptr() not in own}
    del output
    return sum(sizes.values()) / MIB


def peak_mib(run: Callable[[], object], device: torch.device) -> float:
    """The peak memory of PyTorch during ``run``, minus the memory before it, in mebibytes.

    On a GPU it comes from the allocator's statistics, elsewhere from the profiler's record of every allocation, without
    memory that libraries allocate themselves.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return (torch.cuda.max_memory_allocated(device) - before) / MIB
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as recorded:
        run()
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most / MIB
