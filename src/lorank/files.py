"""Atomic writing of files and folders, and reading with a limit on the size.

A file or a folder is written next to its destination under a temporary name (``.NAME.PID.part``). It is flushed to disk
(fsync of the files, then of the parent folder) and renamed. If the process or the machine stops at any moment, a reader
finds either the complete old content or the complete new content.
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

_RENAME_EXCHANGE = 2  # RENAME_EXCHANGE of Linux's renameat2
_AT_FDCWD = -100  # Linux: paths are relative to the working directory


class WriteError(LorankError, OSError):
    """A file cannot be written, e.g. for lack of space or permission. The old content is unchanged."""


@contextmanager
def replacing_file(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path to write to, then renames that file to ``path``.

    If the body raises, ``path`` is unchanged and the temporary file is removed.

    Raises:
        WriteError: no space, no permission.
    """
    path = Path(path)
    temporary = _temporary_path(path)
    with _system_errors_as_write_errors(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            sync(temporary)
            os.replace(temporary, path)
            sync(path.parent)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


@contextmanager
def replacing_folder(path: str | Path) -> Iterator[Path]:
    """Yields an empty temporary folder to write to, then renames that folder to ``path``.

    An existing folder is exchanged for the new one in one step where the system supports this (Linux, most file
    systems). On other systems, neither folder has this name for a moment; the old one is then called
    ``.NAME.PID.old``.

    Raises:
        WriteError: no space, no permission.
    """
    path = Path(path)
    temporary, old = _temporary_path(path), path.with_name(f".{path.name}.{os.getpid()}.old")
    with _system_errors_as_write_errors(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
            yield temporary
            sync_tree(temporary)
            if not path.exists():
                temporary.rename(path)
            elif not _swap_names(temporary, path):
                path.rename(old)
                temporary.rename(path)
            sync(path.parent)
        finally:
            if old.exists() and not path.exists():
                old.rename(path)
            for leftover in (temporary, old):
                shutil.rmtree(leftover, ignore_errors=True)


def write_text(path: str | Path, text: str) -> None:
    """Writes a file atomically: a reader sees the complete old or the complete new content.

    Raises:
        WriteError: no space, no permission.
    """
    with replacing_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def append_text(path: str | Path, text: str) -> None:
    """Appends to a file and flushes it to disk. If this fails, the file keeps its old content only.

    Raises:
        WriteError: no space, no permission.
    """
    path = Path(path)
    with _system_errors_as_write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        new = not path.exists()
        with path.open("ab", buffering=0) as file:  # close() would write a buffer again after a failure
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
    """Removes the temporary files of killed processes from ``folder``. No other process may write there meanwhile."""
    for leftover in [*Path(folder).glob(".*.part"), *Path(folder).glob(".*.old")]:
        if leftover.is_dir() and not leftover.is_symlink():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)


def is_leftover(path: Path) -> bool:
    """Whether ``path`` has the name of a temporary file that :func:`remove_leftovers` removes."""
    return path.name.startswith(".") and path.suffix in (".part", ".old")


def sync(path: str | Path) -> None:
    """Flushes a file's content, or a folder's list of names, to disk. A folder that cannot be opened is skipped."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except PermissionError:
        if Path(path).is_dir():
            return  # Windows cannot open folders
        raise
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # a file system without fsync
            raise
    finally:
        os.close(handle)


def sync_tree(folder: str | Path) -> None:
    """Calls :func:`sync` on everything in a folder and on the folder itself."""
    for path in sorted(Path(folder).rglob("*")):
        if not path.is_symlink():
            sync(path)
    sync(folder)


def read_bounded(path: str | Path, limit: int) -> str:
    """Reads a UTF-8 text file of at most ``limit`` bytes.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is larger than ``limit``, or not UTF-8.
    """
    with Path(path).open("rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise ValueError(f"the file is larger than {limit:,} bytes, more than any such file needs")
    return data.decode("utf-8")


def parse_json(text: str) -> Any:
    """Parses JSON and raises one kind of error for every fault.

    Raises:
        ValueError: ``text`` is not JSON, or is nested deeper than Python's recursion limit.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("the JSON is nested too deeply") from error


def _temporary_path(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.part")


@contextmanager
def _system_errors_as_write_errors(path: Path) -> Iterator[None]:
    """Turns an OSError into a WriteError that names the file and what remains of it."""
    try:
        yield
    except WriteError:
        raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            advice = "there is no space left. Free some; the old content is unchanged, and a run can be resumed"
        else:
            advice = "the old content is unchanged"
        raise WriteError(f"{path} cannot be written: {error.strerror or error}: {advice}") from error


def _swap_names(first: Path, second: Path) -> bool:
    """Swaps two names in one step. Returns False if the system does not support this."""
    try:
        swap = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    return bool(swap(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE) == 0)
