"""Finds the complete checkpoints in a folder, so that a run resumes from the latest complete one.

The Trainer writes a checkpoint file by file under its final name. A reader during this time, or after a crash, finds an
incomplete checkpoint. After the last file, :func:`seal` flushes the checkpoint to disk and writes
``lorank_complete.json`` with the size and the SHA-256 of every file.

A checkpoint with this file is complete if all files agree with it. A checkpoint without it (the process was killed just
before, or another program wrote the checkpoint) is complete if the Trainer has written its own state, which it writes
last, and no file is truncated.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from lorank.files import is_leftover, parse_json, read_bounded, remove_leftovers, sync_tree, write_text
from lorank.lora import is_adapter_file

logger = logging.getLogger("lorank")

SEAL = "lorank_complete.json"
STATE = "trainer_state.json"
_NAME = re.compile(r"checkpoint-(\d+)")
_MAX_STATE = 256_000_000
_REQUIRED = ("optimizer.pt", "scheduler.pt")
# an adapter, or a complete model in one file or in several
_WEIGHTS = (
    ("adapter_config.json", "adapter_model.safetensors"),
    ("model.safetensors",),
    ("model.safetensors.index.json",),
)
# what the Trainer and save_pretrained write into a folder, besides an adapter
_WRITTEN = re.compile(
    r"README\.md|trainer_state\.json|training_args\.bin|(optimizer|scheduler|scaler)\.(pt|bin)|rng_state(_\d+)?\.pth"
    r"|(model|pytorch_model)(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?|config\.json|generation_config\.json"
    r"|(tokenizer|vocab|spiece|sentencepiece|special_tokens_map|added_tokens|chat_template)(\.\w+)*|merges\.txt"
    r"|\w+_config\.json"
)
_OTHER_PROCESSES = re.compile(r"rng_state_\d+\.pth")  # of other processes, which may write them later


def seal(checkpoint: str | Path) -> None:
    """Flushes ``checkpoint`` to disk, then marks it as complete.

    Raises:
        WriteError: no space, no permission.
    """
    checkpoint = Path(checkpoint)
    (checkpoint / SEAL).unlink(missing_ok=True)
    sync_tree(checkpoint)
    files = {path.relative_to(checkpoint).as_posix(): _fingerprint(path) for path in _files(checkpoint)}
    write_text(checkpoint / SEAL, json.dumps(files, indent=1) + "\n")


def last_checkpoint(folder: str | Path) -> str | None:
    """The latest complete checkpoint in a Trainer's output folder, or None.

    Use it to resume after a process was killed, perhaps while it saved:
    ``trainer.train(resume_from_checkpoint=lorank.last_checkpoint("out"))``. A warning in the log names each incomplete
    checkpoint that is skipped.
    """
    for path in reversed(checkpoints(folder)):
        reason = find_problem(path)
        if reason is None:
            return str(path)
        logger.warning("%s is not complete (%s): an earlier checkpoint is used", path, reason)
    return None


def remove_broken(folder: str | Path) -> None:
    """Removes incomplete checkpoints, with a warning each, so that later checkpoints do not mix with their files.

    A file that no Trainer writes stays where it is.
    """
    for path in checkpoints(folder):
        reason = find_problem(path)
        if reason is not None:
            others = files_of_others(path)
            if others and len(others) == sum(not other.is_dir() for other in path.rglob("*")):
                continue  # no checkpoint, or no longer one
            logger.warning("%s is not complete (%s): it is removed", path, reason)
            _remove_written(path, others)
        else:
            remove_leftovers(path)


def checkpoints(folder: str | Path) -> list[Path]:
    """All folders ``checkpoint-<step>``, in ascending order of their steps."""
    found = [path for path in Path(folder).glob("checkpoint-*") if _NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    """The step in the name of a checkpoint."""
    return int(checkpoint.name.rpartition("-")[2])


def files_of_others(folder: Path) -> list[Path]:
    """The files in a checkpoint, or in a folder with an adapter or a model, that neither PEFT nor the Trainer writes.

    Files that are named in a checkpoint's seal were written by the Trainer, whatever their names are.
    """
    try:
        sealed = parse_json(read_bounded(folder / SEAL, _MAX_STATE))
    except (OSError, ValueError):
        sealed = None
    known = sealed if isinstance(sealed, dict) else {}
    return [
        path
        for path in sorted(folder.rglob("*"))
        if not path.is_dir() or path.is_symlink()
        if not (is_adapter_file(path.name) or is_leftover(path) or _WRITTEN.fullmatch(path.name) or path.name == SEAL)
        if path.relative_to(folder).as_posix() not in known
    ]


def _remove_written(folder: Path, others: list[Path]) -> None:
    """Removes a folder, except for the files ``others`` and their parent folders."""
    if not others:
        shutil.rmtree(folder)
        return
    for path in sorted(folder.rglob("*"), reverse=True):  # a folder comes after its content
        if path.is_dir() and not path.is_symlink():
            if not any(path.iterdir()):
                path.rmdir()
        elif path not in others:
            path.unlink()


def find_problem(checkpoint: Path) -> str | None:
    """The reason why a checkpoint is not complete, or None if it is complete."""
    sealed = checkpoint / SEAL
    try:
        if sealed.is_file():
            return _compare_with_seal(checkpoint, parse_json(read_bounded(sealed, _MAX_STATE)))
        state = parse_json(read_bounded(checkpoint / STATE, _MAX_STATE))
    except (OSError, ValueError) as error:
        return str(error)
    if not isinstance(state, dict) or state.get("global_step") != step_of(checkpoint):
        return f"{STATE} is of another step"
    missing = [name for name in _REQUIRED if not (checkpoint / name).is_file()]
    # Each of several processes writes a state of its own, and a single process writes rng_state.pth.
    if not any(checkpoint.glob("rng_state*.pth")):
        missing.append("rng_state.pth")
    if missing:
        return f"{missing[0]} is missing"
    if not any(all((checkpoint / name).is_file() for name in names) for names in _WEIGHTS):
        return "the weights are missing"
    return next((f"{path.name} is truncated" for path in _files(checkpoint) if not _is_complete(path)), None)


def _compare_with_seal(checkpoint: Path, sealed: Any) -> str | None:
    if not isinstance(sealed, dict):
        return f"{SEAL} is damaged"
    for name, recorded in sealed.items():
        path = checkpoint / name
        if not path.resolve().is_relative_to(checkpoint.resolve()) or not path.is_file():
            return f"{name} is missing"
        if _fingerprint(path) != recorded:
            return f"{name} has changed since it was written"
    return None


def _files(checkpoint: Path) -> Iterator[Path]:
    for path in sorted(checkpoint.rglob("*")):
        if (
            path.is_file()
            and path.name != SEAL
            and not path.name.startswith(".")
            and not _OTHER_PROCESSES.fullmatch(path.name)
        ):
            yield path


def _fingerprint(path: Path) -> dict[str, Any]:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}


def _is_complete(path: Path) -> bool:
    """Whether a file is not truncated: safetensors names its length, and torch's archives have their table last."""
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt"):
                return True
        except (OSError, SafetensorError):
            return False
    if path.suffix in (".pt", ".pth"):
        return zipfile.is_zipfile(path)
    return True
