"""Files as a reader may find them: whole, or not there. And files of strangers: bounded before they are read.

A file or a folder is written beside its place under a temporary name (``.NAME.PID.part``), brought to the disk (fsync
of the files, then of the folder that names them) and renamed. Whenever the process or the machine stops, the old
content is there or the new, never a part of one.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lorank.errors import LorankError

_EXCHANGE = 2  # RENAME_EXCHANGE of Linux's renameat2
_HERE = -100  # AT_FDCWD


class WriteError(LorankError, OSError):
    """A file cannot be written: no space, no permission. What was there before is still there."""


@contextmanager
def replacing_file(path: str | Path) -> Iterator[Path]:
    """Yields a temporary name to write to; afterwards the file has taken the place of ``path``.

    Where the body raises, ``path`` stays as it was, and nothing else is left.

    Raises:
        WriteError: no space, no permission.
    """
    path = Path(path)
    scratch = _scratch(path)
    with _told(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            yield scratch
            sync(scratch)
            os.replace(scratch, path)
            sync(path.parent)
        except BaseException:
            scratch.unlink(missing_ok=True)
            raise


@contextmanager
def replacing_folder(path: str | Path) -> Iterator[Path]:
    """The same for a folder: yields an empty one, which afterwards is ``path``.

    An old folder is exchanged for the new one in one step where the system can do that (Linux, most file systems).
    Elsewhere there is a moment without either under this name, and the old one lies beside it as ``.NAME.PID.old``.

    Raises:
        WriteError: no space, no permission.
    """
    path = Path(path)
    scratch, old = _scratch(path), path.with_name(f".{path.name}.{os.getpid()}.old")
    with _told(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(scratch, ignore_errors=True)
            scratch.mkdir()
            yield scratch
            sync_tree(scratch)
            if not path.exists():
                scratch.rename(path)
            elif not _exchange(scratch, path):
                path.rename(old)
                scratch.rename(path)
            sync(path.parent)
        finally:
            if old.exists() and not path.exists():
                old.rename(path)
            for left in (scratch, old):
                shutil.rmtree(left, ignore_errors=True)


def write_text(path: str | Path, text: str) -> None:
    """Writes a file in one go: a reader sees the old content or the new.

    Raises:
        WriteError: no space, no permission.
    """
    with replacing_file(path) as scratch:
        scratch.write_text(text, encoding="utf-8")


def append_text(path: str | Path, text: str) -> None:
    """Adds to a file, on disk when this returns. Where it fails, what was there before stays, without a part of this.

    Raises:
        WriteError: no space, no permission.
    """
    path = Path(path)
    with _told(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        new = not path.exists()
        with path.open("ab", buffering=0) as file:  # a buffer would be written once more when it is closed
            before, data = file.tell(), memoryview(text.encode())
            try:
                while data:
                    data = data[file.write(data) :]
                os.fsync(file.fileno())
            except OSError:
                os.ftruncate(file.fileno(), before)
                raise
        if new:
            sync(path.parent)


def remove_leftovers(folder: str | Path) -> None:
    """Removes what writers that were killed have left in ``folder``; call it where nobody else writes there."""
    for left in [*Path(folder).glob(".*.part"), *Path(folder).glob(".*.old")]:
        if left.is_dir() and not left.is_symlink():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)


def is_leftover(path: Path) -> bool:
    """Whether it is what :func:`remove_leftovers` removes."""
    return path.name.startswith(".") and path.suffix in (".part", ".old")


def sync(path: str | Path) -> None:
    """Brings a file's content, or a folder's list of names, to the disk. Where a folder cannot be opened: nothing."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except PermissionError:
        if Path(path).is_dir():
            return  # Windows opens no folders
        raise
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # a file system without it
            raise
    finally:
        os.close(handle)


def sync_tree(folder: str | Path) -> None:
    """:func:`sync` for everything in a folder, and the folder."""
    for path in sorted(Path(folder).rglob("*")):
        if not path.is_symlink():
            sync(path)
    sync(folder)


def read_bounded(path: str | Path, limit: int) -> str:
    """A text file of at most ``limit`` bytes.

    Raises:
        OSError: it cannot be read.
        ValueError: it is larger, or not UTF-8.
    """
    with Path(path).open("rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise ValueError(f"it is larger than {limit:,} bytes, more than any such file needs")
    return data.decode("utf-8")


def parse_json(text: str) -> Any:
    """JSON, with one kind of error for all that can be wrong with it.

    Raises:
        ValueError: it is not JSON, or nested deeper than Python can follow.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _scratch(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.part")


@contextmanager
def _told(path: Path) -> Iterator[None]:
    """The system's error as one that says what was being written and what is left."""
    try:
        yield
    except WriteError:
        raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            advice = "there is no space. Free some; what was complete before is still there, and a run can be resumed"
        else:
            advice = "what was complete before is still there"
        raise WriteError(f"{path} cannot be written: {error.strerror or error}: {advice}") from error


def _exchange(first: Path, second: Path) -> bool:
    """Swaps two names in one step; False where the system cannot."""
    try:
        swap = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    return bool(swap(_HERE, os.fsencode(first), _HERE, os.fsencode(second), _EXCHANGE) == 0)
