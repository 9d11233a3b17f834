"""The rules of the house: which room may import which, and how long a file may be."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import lorank

SOURCE = Path(lorank.__file__).parent
FILES = sorted(SOURCE.rglob("*.py"))

CONFIGURATION = {"config", "config_errors", "config_yaml"}
# Each room may import itself and the rooms named here.
ALLOWED = {
    "errors": set(),
    "files": {"errors"},
    "lora": {"errors", "files"},
    "scoring": {"errors", "lora"},
    "allocators": {"errors", "lora", "scoring"},
    "training": {"errors", "files", "lora", "scoring", "allocators"},
    "tasks": {"errors"},
    "report": {"errors", "files", "training"},
    "experiments": {"errors", "files", "lora", "scoring", "allocators", "training", "tasks", "report", *CONFIGURATION},
}


def room_of(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imports(path: Path) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute here"
            found += [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
    return found


@pytest.mark.parametrize("path", [f for f in FILES if room_of(f) in ALLOWED], ids=lambda f: str(f.relative_to(SOURCE)))
def test_arrows_point_one_way(path: Path) -> None:
    room = room_of(path)
    for name in imports(path):
        parts = name.split(".")
        if (
            parts[0] == "lorank"
            and len(parts) > 1
            and (SOURCE / parts[1]).with_suffix(".py").exists() | (SOURCE / parts[1]).is_dir()
        ):
            assert parts[1] in {room, "_version", *ALLOWED[room]}, f"{room} must not import {name}"


def test_every_room_has_its_rule() -> None:
    rooms = {room_of(f) for f in FILES if f.parent != SOURCE}
    assert rooms <= set(ALLOWED), f"add {rooms - set(ALLOWED)} to ALLOWED"


@pytest.mark.parametrize("path", FILES, ids=lambda f: str(f.relative_to(SOURCE)))
def test_only_the_lora_room_knows_peft_and_only_training_and_above_the_trainer(path: Path) -> None:
    names = imports(path)
    if room_of(path) != "lora":
        assert not any(name.split(".")[0] == "peft" for name in names)
    if room_of(path) in {"lora", "scoring", "allocators"}:
        assert not any(name.startswith("transformers.") and "Trainer" in name for name in names)


@pytest.mark.parametrize("path", FILES, ids=lambda f: str(f.relative_to(SOURCE)))
def test_files_are_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 350
