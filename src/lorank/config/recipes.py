"""The recipes in the package, and the paths in a configuration file, which are relative to that file."""

from __future__ import annotations

import os
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from lorank.config.errors import ConfigError

FOLDER = Path(__file__).parents[1] / "recipes"

PATHS = ("model.name", "task.data")
"""The keys whose value may be a path. `output_dir` is not one of them: results go to the folder where lorank runs."""


def recipe_names() -> list[str]:
    """The names of the recipes in the package, in order: `e2e_alora`, `suite/manual`, …

    A file whose name begins with _ is a part of others.
    """
    files = [path.relative_to(FOLDER) for path in FOLDER.rglob("*.yaml") if not path.name.startswith("_")]
    return sorted(path.with_suffix("").as_posix() for path in files)


def find_file(given: str | Path, *, beside: Path | None = None) -> Path:
    """The file of a configuration: a path, or the name of a recipe in the package (`e2e_alora`).

    Args:
        given: the path or the name; `recipes/e2e_alora.yaml` is also the name of a recipe, if there is no such file.
        beside: the folder that a relative path starts from; None: the current folder.

    Raises:
        ConfigError: there is neither such a file nor such a recipe. The message lists the recipes.
    """
    path = Path(given).expanduser()
    path = path if beside is None else beside / path
    try:
        if path.is_file():
            return path
    except OSError:  # a name that the system refuses, for example because it is too long
        pass
    else:
        if path.is_dir():
            raise ConfigError(f"{given} is a folder. Give a YAML file in it, for example {path / 'config.yaml'}.")
    name = (
        Path(given).with_suffix("").as_posix().removeprefix("recipes/") if Path(given).suffix in ("", ".yaml") else ""
    )
    if name in recipe_names():
        return FOLDER / f"{name}.yaml"
    near = get_close_matches(name, recipe_names(), n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ConfigError(
        f"{str(path)[:300]}: there is no such file.{hint} Give your own YAML file or the name of a recipe: "
        f"{', '.join(recipe_names())}."
    )


def with_absolute_paths(values: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """A copy of a file's values, in which the paths are absolute. Names that are not paths are unchanged.

    Args:
        values: nested mappings, as in the YAML file.
        folder: the folder of the file, from which its relative paths start.

    Raises:
        ConfigError: a value is the name of something in the current folder only. It might be meant as a path or as the
            name of a data set or a model.
    """
    result = dict(values)
    for key in PATHS:
        section, name = key.split(".")
        part = result.get(section)
        if isinstance(part, Mapping) and isinstance(part.get(name), str):
            result[section] = {**part, name: absolute_path(part[name], folder, key)}
    return result


def absolute_path(value: str, folder: Path, key: str) -> str:
    """A value of `key` in a file in `folder`: an absolute path if it is a path, else unchanged.

    Raises:
        ConfigError: see :func:`with_absolute_paths`.
    """
    path = Path(value).expanduser()
    if "${" in value or path.is_absolute():
        return value
    own = Path(os.path.abspath(folder / path))
    try:
        if own.exists():
            return str(own)
        here = path.exists()
    except OSError:  # not the name of a file
        return value
    if value.startswith("."):
        return str(own)  # certainly a path: an error about it names where it was searched
    if here:
        raise ConfigError(
            f"{key}: {value!r} is in the current folder, but not beside the file that names it, and paths in a file "
            f"are relative to that file. If you mean {path.absolute()}, write {key}={value} on the command line, or "
            "this path in the file. If you mean the data set or model of this name, run lorank in another folder"
        )
    return value
