"""The start of a worker process. It imports nothing slow, so that also what imports print goes to the worker's log."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import sys
import threading
from multiprocessing.connection import wait
from typing import Any


def start(job: bytes, log: str) -> None:
    """Does the work of a process whose parent started it, and ends with the parent.

    Args:
        job: a pickled function without arguments.
        log: the file for everything that the process prints.
    """
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which terminates its workers
    with open(log, "w", encoding="utf-8", buffering=1) as file:
        sys.stdout.flush()
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        sys.stdout = sys.stderr = file
        pickle.loads(job)()


def _end_with(sentinel: Any) -> None:
    """Ends this process when its parent has ended, also if that was killed."""
    wait([sentinel])
    os._exit(1)
