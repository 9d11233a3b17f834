"""Complete runs: from a configuration to an adapter and its metrics."""

from lorank.extras import require

require("lorank.experiments", "rich")

from lorank.experiments.errors import ModelError, RunFolderError, SettingsError  # noqa: E402  # after the check
from lorank.experiments.run import RunResult, train  # noqa: E402  # after the check

__all__ = ["ModelError", "RunFolderError", "RunResult", "SettingsError", "train"]
