"""What each of several processes on one machine gets: its share of the cores, and a GPU."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
"""The variables that limit the threads of torch's libraries."""


def threads_per_job(jobs: int) -> int:
    """The share of one of ``jobs`` processes in this process's cores; at most OMP_NUM_THREADS, if it is set. ≥ 1."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    most = os.environ.get("OMP_NUM_THREADS", "")
    return max(1, min(cores // jobs, int(most) if most.isdigit() else cores))


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    import torch

    count = torch.cuda.device_count()  # the variable may name GPUs that are not there
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return [str(number) for number in range(count)] if visible is None else visible.split(",")[:count]


@contextmanager
def job_environment(number: int, jobs: int, gpus: Sequence[str]) -> Iterator[None]:
    """Sets the environment of a process that is started meanwhile: libraries read it when they are loaded.

    Args:
        number: the number of the process, from 0.
        jobs: how many processes run at the same time.
        gpus: names for CUDA_VISIBLE_DEVICES, of which the process gets one; none: it sees what this process sees.
    """
    values = dict.fromkeys(THREADS, str(threads_per_job(jobs)))
    if gpus:
        values["CUDA_VISIBLE_DEVICES"] = gpus[number % len(gpus)]
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
