"""The folder of an export: what may be replaced in it, and how.

A form that is no PEFT adapter comes with a record, ``lorank_export.json``, which lists the files of the export. Only a
folder that holds these files and nothing else is ever replaced. The new folder is written beside it under a temporary
name, and takes its name when it is complete and checked.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lorank.errors import AdapterError
from lorank.files import (
    is_leftover,
    parse_json,
    read_bounded,
    swap_names,
    sync,
    sync_tree,
    system_errors_as_write_errors,
    temporary_path,
)

RECORD = "lorank_export.json"
_MAX_RECORD = 1_000_000


def check_out(out: Path, adapter: Path, *, overwrite: bool, is_adapter: bool) -> None:
    """Checks that an export may be written to ``out``, before anything slow begins.

    Args:
        is_adapter: whether the form is a PEFT adapter.

    Raises:
        AdapterError: ``out`` is the adapter itself; or it exists, is not empty, and ``overwrite`` is False; or it holds
            other files than an earlier export of the same kind.
    """
    if out.resolve() == adapter.resolve():
        raise AdapterError(f"{out} is the adapter itself, which is never changed: name another folder")
    if not out.exists() or (out.is_dir() and all(map(is_leftover, out.iterdir()))):
        return
    if not out.is_dir():
        raise AdapterError(f"{out} is a file: name a new folder")
    if not overwrite:
        raise AdapterError(f"{out} already exists: name a new folder, or replace the export in it (overwrite)")
    if is_adapter:
        if (out / RECORD).exists():
            raise AdapterError(f"{out} holds an export in another form: name a new folder")
        return  # what may be replaced there is decided as for every save of an adapter
    others = sorted(path.name for path in out.iterdir() if path.name not in _recorded(out) and not is_leftover(path))
    if others:
        raise AdapterError(f"{out} also holds {others[0]}, which is no file of an earlier export: name a new folder")


def _recorded(folder: Path) -> set[str]:
    try:
        record = parse_json(read_bounded(folder / RECORD, _MAX_RECORD))
        return {RECORD, *map(str, record["files"])}
    except (OSError, ValueError, KeyError, TypeError):
        return set()


@contextmanager
def replacing_folder(target: Path) -> Iterator[Path]:
    """Yields an empty temporary folder, which then takes the place of ``target``. If the body raises, nothing changes.

    The caller has asked :func:`check_out`.

    Raises:
        WriteError: no space, no permission.
    """
    with system_errors_as_write_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        staged = temporary_path(target)
        try:
            shutil.rmtree(staged, ignore_errors=True)
            staged.mkdir()
            yield staged
            sync_tree(staged)
            if target.exists() and not swap_names(staged, target):
                shutil.rmtree(target)  # no system call exchanges two folders here
            if staged.exists() and not (target.exists()):
                staged.rename(target)
            sync(target.parent)
        finally:
            shutil.rmtree(staged, ignore_errors=True)


def write_record(folder: Path, form: str, adapter: str, difference: float) -> None:
    """Writes what the folder is, and which files belong to it."""
    files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    names = sorted({name.partition("/")[0] for name in files})
    record = {"form": form, "adapter": adapter, "largest_relative_difference": difference, "files": names}
    (folder / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
