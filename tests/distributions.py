"""A distribution as pip leaves it behind: a folder with its name and its entry points, beside its modules."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from lorank.allocators.registry import GROUP


def install(folder: Path, name: str, methods: Mapping[str, str]) -> None:
    """Registers ``methods`` (name → ``module:class``) of a distribution in a folder that is on ``sys.path``."""
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    lines = [f"[{GROUP}]", *(f"{method} = {value}" for method, value in methods.items())]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")
