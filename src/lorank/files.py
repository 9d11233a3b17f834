"""Atomic writing of files, and reading with a limit on the size.

A file is written next to its destination under a temporary name (``.NAME.PID.part``). It is flushed to disk (fsync of
the file, then of its folder) and renamed. If the process or the machine stops at any moment, a reader finds either the
complete old content or the complete new content. :mod:`lorank.lora.io.adapter_folder` does the same for the files of an
adapter.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lorank.errors import LorankError

_RENAME_EXCHANGE = 2  # RENAME_EXCHANGE of Linux's renameat2
_AT_FDCWD = -100  # Linux: paths are relative to the working directory
_LEFTOVER = re.compile(r"\..+\.\d+\.(part|old)")


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
    temporary = temporary_path(path)
    with system_errors_as_write_errors(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            sync(temporary)
            os.replace(temporary, path)
            sync(path.parent)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


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
    with system_errors_as_write_errors(path):
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
    for leftover in filter(is_leftover, list(Path(folder).iterdir())):
        if leftover.is_dir() and not leftover.is_symlink():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)


def is_leftover(path: Path) -> bool:
    """Whether ``path`` has the name of a temporary file that :func:`remove_leftovers` removes, ``.NAME.PID.part``."""
    return _LEFTOVER.fullmatch(path.name) is not None


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


def temporary_path(path: Path) -> Path:
    """The temporary name beside ``path``, ``.NAME.PID.part``."""
    return path.with_name(f".{path.name}.{os.getpid()}.part")


@contextmanager
def system_errors_as_write_errors(path: Path) -> Iterator[None]:
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


def swap_names(first: Path, second: Path) -> bool:
    """Exchanges two names in one step. Returns False if the system does not support this."""
    try:
        swap = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    return bool(swap(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE) == 0)
