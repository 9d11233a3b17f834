"""Complete runs: from a configuration to an adapter and its metrics."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lorank.extras import require
from lorank.lazy import lazy_attributes

if TYPE_CHECKING:
    from lorank.experiments.errors import ModelError, RunFolderError, SettingsError
    from lorank.experiments.run import RunResult, train

require("lorank.experiments", "rich")

_HOMES = {
    "ModelError": "errors",
    "RunFolderError": "errors",
    "RunResult": "run",
    "SettingsError": "errors",
    "train": "run",
}

__all__ = ["ModelError", "RunFolderError", "RunResult", "SettingsError", "train"]

__getattr__, __dir__ = lazy_attributes(__name__, _HOMES)
