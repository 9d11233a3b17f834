"""The rules of the house: which folder may import which, and that no files import each other in a circle."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import lorank

SOURCE = Path(lorank.__file__).parent
FILES = sorted(SOURCE.rglob("*.py"))

ENGINE = ("errors", "files", "lora", "scoring", "allocators", "training")
# Each room may import itself and the rooms named here.
ALLOWED = {
    "errors": set(),
    "extras": {"errors"},
    "lazy": set(),
    "files": {"errors"},
    "lora": {"errors", "extras", "files"},
    "scoring": {"errors", "lora"},
    "allocators": {"errors", "lora", "scoring"},
    "training": {"errors", "extras", "files", "lora", "scoring", "allocators", "report"},
    "tasks": {"errors", "extras", "lazy"},
    "report": {"errors", "extras", "files"},
    "experiments": {*ENGINE, "extras", "lazy", "tasks", "report", "config"},
    "cli": {*ENGINE, "extras", "tasks", "report", "config", "experiments"},
    "config": {"errors", "extras", "files", "lazy", "allocators", "tasks"},
    "testing": {"errors", "lora", "allocators", "training"},
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


def module_file(name: str) -> Path | None:
    """The file of a module or package of lorank's, or None if there is none of that name."""
    parts = name.split(".")
    if parts[0] != "lorank" or len(parts) == 1:
        return None
    place = SOURCE.joinpath(*parts[1:])
    return next((file for file in (place.with_suffix(".py"), place / "__init__.py") if file.is_file()), None)


def files_imported(path: Path) -> set[Path]:
    """The files of lorank's that a file imports, wherever in it: at its top, in functions, for type checkers."""
    found: set[Path | None] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {module_file(alias.name) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            whole = module_file(node.module or "")
            found |= {module_file(f"{node.module}.{alias.name}") or whole for alias in node.names}
    return {file for file in found if file is not None and file != path}


def test_no_files_import_each_other_in_a_circle() -> None:
    sorter = TopologicalSorter({path: files_imported(path) for path in FILES})
    try:
        sorter.prepare()
    except CycleError as error:
        circle = " → ".join(str(path.relative_to(SOURCE)) for path in error.args[1])
        pytest.fail(f"a circle of imports: {circle}")
