"""Checks of a configuration that need neither torch nor the classes of the methods, so that a mistake shows at once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pydantic import ValidationError

from lorank.config.errors import ConfigError, explain
from lorank.config.recipes import find_file, with_absolute_paths
from lorank.config.sections import RunSections
from lorank.config.yaml_files import apply_overrides, read_yaml


def check_sections(path: str | Path, overrides: Sequence[str] = ()) -> RunSections:
    """Reads a configuration and checks all but the allocator's own settings.

    Args:
        path: the file, or the name of a recipe.
        overrides: `dotted.key=value`.

    Raises:
        ConfigError: see :func:`lorank.config.load_config`.
    """
    file = find_file(path)
    values = apply_overrides(with_absolute_paths(read_yaml(file), file.parent), overrides)
    try:
        return RunSections.model_validate(values)
    except ValidationError as error:
        raise ConfigError(explain(error, RunSections, str(path), values)) from error
