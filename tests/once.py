"""What takes long and several workers of pytest-xdist need is made by one of them; the others wait for it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock


def once(folders: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """A folder of that name, the same for all workers of this test run, in which ``make`` has been called once."""
    base = folders.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    with FileLock(f"{folder}.lock"):
        if not (done := folder / "done").exists():
            folder.mkdir(exist_ok=True)
            make(folder)
            done.touch()
    return folder
