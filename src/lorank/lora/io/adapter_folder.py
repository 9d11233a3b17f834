"""The files of an adapter in a folder, and how a new adapter replaces them.

Only an adapter's own files are replaced or removed: ``adapter_config.json``, ``adapter_model.safetensors``, and the
``adapter_model.bin`` or the shards of an older save, which a loader might read instead of the new weights. A
``README.md`` is written if there is none; of one that is there, only the lines between lorank's marks are replaced
(:mod:`lorank.lora.io.model_card`). No other file or folder is ever touched, at any moment.

**A new folder, or a folder that holds nothing but an adapter.** The new folder is written beside it under a temporary
name (``.NAME.PID.part``), flushed to disk, and renamed or exchanged in one step. If the process or the machine stops at
any moment, the folder holds the complete old adapter or the complete new one.

**A folder that also holds other files** (a Trainer's ``output_dir``), or a system that cannot exchange two folders.
Several files cannot be renamed in one step. So the complete new adapter first becomes the subfolder
``.lorank_new_adapter``, by one rename, and then:

    the old adapter_config.json goes → weights → stale weights go → the new adapter_config.json → the subfolder goes

If the process or the machine stops in between, the folder has no ``adapter_config.json``, so that PEFT and servers
refuse it, and never load old settings with new weights. While the subfolder exists, :func:`lorank.lora.load_adapter`
and ``lorank prune`` read the new adapter from it, and the next :func:`lorank.save_adapter` into the folder first
completes the interrupted one. An error before the first file was replaced restores the old adapter.

Two processes must not save into the same folder at the same time.
"""

from __future__ import annotations

import glob
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lorank.files import WriteError, swap_names, sync, sync_tree, system_errors_as_write_errors, temporary_path
from lorank.lora.io.adapter_validation import CONFIG
from lorank.lora.io.model_card import README, merged_card

NEW_ADAPTER = ".lorank_new_adapter"
"""The subfolder with the complete new adapter, while its files replace those of the old one."""
_OWN = re.compile(r"adapter_config\.json|adapter_model(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?")
_LEFTOVER = re.compile(r"\.(?P<name>.+)\.(?P<pid>\d+)\.(part|old)")


def is_adapter_file(name: str) -> bool:
    """Whether a file of this name belongs to an adapter: its settings, its weights, or a shard of them."""
    return _OWN.fullmatch(name) is not None


def contains_adapter(folder: Path) -> bool:
    """Whether the folder holds an adapter, also one whose save was interrupted."""
    return (folder / CONFIG).is_file() or (folder / NEW_ADAPTER / CONFIG).is_file()


def readable_folder(folder: Path) -> Path:
    """The folder to read an adapter from: ``folder``, or after an interrupted save its subfolder with the new one."""
    new = folder / NEW_ADAPTER
    return new if (new / CONFIG).is_file() else folder


@contextmanager
def replacing_adapter(folder: Path) -> Iterator[Path]:
    """Yields an empty temporary folder; the adapter that is written to it then replaces the adapter in ``folder``.

    If the body raises, ``folder`` is unchanged.

    Raises:
        WriteError: no space, no permission.
    """
    folder = Path(os.path.realpath(folder))  # a link to a folder stays a link
    with system_errors_as_write_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        if (folder / NEW_ADAPTER).is_dir():
            _place_files(folder, resumed=True)
        _remove_leftovers(folder)
        staged = _staging_place(folder)
        try:
            _discard(staged)
            staged.mkdir()
            yield staged
            sync_tree(staged)
            if not folder.exists():
                staged.rename(folder)
            elif not (_holds_only_an_adapter(folder) and _exchange(staged, folder)):
                staged.rename(folder / NEW_ADAPTER)
                sync(folder)
                _place_files(folder, resumed=False)
            sync(folder.parent)
        finally:
            _discard(staged)


def _staging_place(folder: Path) -> Path:
    """Where the new adapter is written: beside a folder that can be exchanged for it, otherwise inside the folder."""
    parent = folder.parent
    if not folder.exists():
        return temporary_path(folder)
    can_rename = os.access(parent, os.W_OK) and parent.stat().st_dev == folder.stat().st_dev
    return temporary_path(folder if can_rename and _holds_only_an_adapter(folder) else folder / NEW_ADAPTER)


def _holds_only_an_adapter(folder: Path) -> bool:
    return all(_is_made_by_a_save(path) and not path.is_dir() for path in folder.iterdir())


def _is_made_by_a_save(path: Path) -> bool:
    return is_adapter_file(path.name) or path.name == README or _leftover_of_an_adapter(path) is not None


def _exchange(staged: Path, folder: Path) -> bool:
    """Exchanges the two folders in one step. Returns False if the system does not support this."""
    if (folder / README).is_file():  # it may be the user's
        card = _new_card(staged, folder)
        (staged / README).unlink(missing_ok=True)
        if card is None:
            _link_or_copy(folder / README, staged / README)
        else:
            _write_like(folder / README, staged / README, card)
    shutil.copymode(folder, staged)
    sync(staged)
    if not swap_names(staged, folder):
        return False
    for path in staged.iterdir():  # the old folder
        if not _is_made_by_a_save(path):
            path.rename(folder / path.name)  # another program wrote it a moment ago
    return True


def _place_files(folder: Path, *, resumed: bool) -> None:
    """Replaces the adapter's files in ``folder`` by those in its subfolder, one by one. It can be repeated.

    Args:
        resumed: another process has begun this and was interrupted. Then the old adapter may be gone already.
    """
    new, old_config = folder / NEW_ADAPTER, temporary_path(folder / CONFIG).with_suffix(".old")
    card = _new_card(new, folder)
    names = [name for name in os.listdir(new) if is_adapter_file(name) or not os.path.lexists(folder / name)]
    if card is not None and README not in names:
        names.append(README)
    names.sort(key=lambda name: (not is_adapter_file(name), name))
    links = {name: temporary_path(folder / name) for name in names}
    can_restore = not resumed
    try:
        for name, link in links.items():
            link.unlink(missing_ok=True)
            if name == README and card is not None and (folder / README).exists():
                _write_like(folder / README, link, card)
            else:
                _link_or_copy(new / name, link)
        if (folder / CONFIG).exists():
            os.replace(folder / CONFIG, old_config)
            sync(folder)
        for name in names:
            if name != CONFIG:
                os.replace(links[name], folder / name)
                can_restore = False
        for path in folder.iterdir():
            if is_adapter_file(path.name) and path.name not in names:
                path.unlink()  # another program might read these old weights instead of the new ones
        sync(folder)
        os.replace(links[CONFIG], folder / CONFIG)
        sync(folder)
    except OSError as error:
        if can_restore:
            if old_config.exists():
                os.replace(old_config, folder / CONFIG)
            _remove_folder(new)
            raise
        raise WriteError(
            f"the adapter in {folder} could only be replaced in part: {error.strerror or error}. The new adapter is "
            f"complete in {new}. Remove the cause and save into {folder} again, or copy its files from there"
        ) from error
    finally:
        for link in links.values():
            link.unlink(missing_ok=True)
    old_config.unlink(missing_ok=True)
    _remove_folder(new)


def _new_card(new: Path, folder: Path) -> str | None:
    """The text of ``folder``'s README after the save; None if it stays as it is, or the new adapter has no card."""
    return merged_card(folder / README, (new / README).read_text("utf-8")) if (new / README).is_file() else None


def _write_like(model: Path, path: Path, text: str) -> None:
    """Writes a file with the permissions of another one."""
    path.write_text(text, encoding="utf-8")
    shutil.copymode(model, path)
    sync(path)


def _link_or_copy(source: Path, destination: Path) -> None:
    """A second name for the file, or a copy where the file system has no hard links."""
    try:
        os.link(source, destination)
    except OSError:
        shutil.copy2(source, destination)
        sync(destination)


def _remove_folder(folder: Path) -> None:
    """Removes the subfolder with the new adapter. It loses its name first, so that nobody finds a part of it."""
    place = temporary_path(folder)
    _discard(place)
    folder.rename(place)
    _discard(place)


def _discard(folder: Path) -> None:
    """Removes a temporary folder. A file that no save made stays, and the folder with it."""
    for path in sorted(folder.rglob("*"), reverse=True):  # a folder comes after its content
        with suppress(OSError):
            if path.is_dir() and not path.is_symlink():
                path.rmdir()
            elif _is_made_by_a_save(path):
                path.unlink()
    with suppress(OSError):
        folder.rmdir()


def _leftover_of_an_adapter(path: Path) -> re.Match[str] | None:
    """The parts of the name of a temporary file that this module made in an adapter's folder."""
    found = _LEFTOVER.fullmatch(path.name)
    return found if found and (is_adapter_file(found["name"]) or found["name"] in (README, NEW_ADAPTER)) else None


def _remove_leftovers(folder: Path) -> None:
    """Removes the temporary files that killed processes left when they saved into this folder."""
    found = [(path, _leftover_of_an_adapter(path)) for path in (folder.iterdir() if folder.is_dir() else ())]
    named = folder.parent.glob(f".{glob.escape(folder.name)}.*.part")
    beside = [(path, _LEFTOVER.fullmatch(path.name)) for path in named]
    found += [(path, match) for path, match in beside if match and match["name"] == folder.name]
    for path, match in found:
        if match and not _is_running(int(match["pid"])):
            if path.is_dir():
                _discard(path)
            else:
                with suppress(OSError):
                    path.unlink()


def _is_running(pid: int) -> bool:
    """Whether a process may exist on this machine. True if this cannot be found out."""
    if os.name != "posix":
        return True  # on Windows, os.kill would end the process
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True
