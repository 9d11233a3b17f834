"""Whole runs: from a configuration to an adapter and its figures."""

from lorank.experiments.errors import ModelError, RunFolderError, SettingsError
from lorank.experiments.run import RunResult, train

__all__ = ["ModelError", "RunFolderError", "RunResult", "SettingsError", "train"]
