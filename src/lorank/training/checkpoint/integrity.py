"""Which of the checkpoints in a folder are whole, and so which one a run goes on from.

The Trainer writes a checkpoint file by file under its final name; whoever looks in between, or after a crash, sees a
part of one. When all of it is there, :func:`seal` brings it to the disk and writes ``lorank_complete.json``, with the
size and the SHA-256 of every file. A checkpoint with this file is whole if all of it agrees; one without (the process
was killed just before, or it is not ours) is whole if the Trainer came to its end, which its own state, written last,
shows, and no file is cut short.
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

from lorank.files import parse_json, read_bounded, remove_leftovers, sync_tree, write_text

logger = logging.getLogger("lorank")

SEAL = "lorank_complete.json"
STATE = "trainer_state.json"
_NAME = re.compile(r"checkpoint-(\d+)")
_MAX_STATE = 256_000_000
_NEEDED = ("optimizer.pt", "scheduler.pt", "rng_state.pth")
# an adapter, or a whole model in one file or several
_WEIGHTS = (
    ("adapter_config.json", "adapter_model.safetensors"),
    ("model.safetensors",),
    ("model.safetensors.index.json",),
)
_OF_OTHERS = re.compile(r"rng_state_\d+\.pth")  # written by other processes, perhaps not yet


def seal(checkpoint: str | Path) -> None:
    """Says that all of ``checkpoint`` is there, once it is on the disk.

    Raises:
        WriteError: no space.
    """
    checkpoint = Path(checkpoint)
    (checkpoint / SEAL).unlink(missing_ok=True)
    sync_tree(checkpoint)
    files = {path.relative_to(checkpoint).as_posix(): _fingerprint(path) for path in _files(checkpoint)}
    write_text(checkpoint / SEAL, json.dumps(files, indent=1) + "\n")


def last_checkpoint(folder: str | Path) -> str | None:
    """The latest checkpoint in a Trainer's output folder that is whole, or None.

    To resume, where a process may have been killed while it saved:
    ``trainer.train(resume_from_checkpoint=lorank.last_checkpoint("out"))``. A warning names those that are passed over.
    """
    for path in reversed(checkpoints(folder)):
        reason = find_problem(path)
        if reason is None:
            return str(path)
        logger.warning("%s is not whole (%s): an earlier one is taken", path, reason)
    return None


def remove_broken(folder: str | Path) -> None:
    """Removes checkpoints that are not whole, with a warning each, so that no later one mixes with their files."""
    for path in checkpoints(folder):
        reason = find_problem(path)
        if reason is not None:
            logger.warning("%s was not written to its end (%s): it is removed", path, reason)
            shutil.rmtree(path)
        else:
            remove_leftovers(path)


def checkpoints(folder: str | Path) -> list[Path]:
    """All folders ``checkpoint-<step>``, by their step."""
    found = [path for path in Path(folder).glob("checkpoint-*") if _NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    """The step that its name says."""
    return int(checkpoint.name.rpartition("-")[2])


def find_problem(checkpoint: Path) -> str | None:
    """Why a checkpoint is not whole, or None if it is."""
    sealed = checkpoint / SEAL
    try:
        if sealed.is_file():
            return _differs(checkpoint, parse_json(read_bounded(sealed, _MAX_STATE)))
        state = parse_json(read_bounded(checkpoint / STATE, _MAX_STATE))
    except (OSError, ValueError) as error:
        return str(error)
    if not isinstance(state, dict) or state.get("global_step") != step_of(checkpoint):
        return f"{STATE} is of another step"
    missing = [name for name in _NEEDED if not (checkpoint / name).is_file()]
    if missing:
        return f"{missing[0]} is missing"
    if not any(all((checkpoint / name).is_file() for name in names) for names in _WEIGHTS):
        return "the weights are missing"
    return next((f"{path.name} is cut short" for path in _files(checkpoint) if not _readable(path)), None)


def _differs(checkpoint: Path, sealed: Any) -> str | None:
    if not isinstance(sealed, dict):
        return f"{SEAL} is damaged"
    for name, was in sealed.items():
        path = checkpoint / name
        if not path.resolve().is_relative_to(checkpoint.resolve()) or not path.is_file():
            return f"{name} is missing"
        if _fingerprint(path) != was:
            return f"{name} is not what was written"
    return None


def _files(checkpoint: Path) -> Iterator[Path]:
    for path in sorted(checkpoint.rglob("*")):
        if (
            path.is_file()
            and path.name != SEAL
            and not path.name.startswith(".")
            and not _OF_OTHERS.fullmatch(path.name)
        ):
            yield path


def _fingerprint(path: Path) -> dict[str, Any]:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}


def _readable(path: Path) -> bool:
    """Whether a file has its end: safetensors says how long it is, and torch's archives have their table last."""
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt"):
                return True
        except (OSError, SafetensorError):
            return False
    if path.suffix in (".pt", ".pth"):
        return zipfile.is_zipfile(path)
    return True
