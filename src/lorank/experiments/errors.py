"""The errors that experiments raise."""

from lorank.errors import LorankError


class ModelError(LorankError):
    """The base model or its tokenizer cannot be loaded."""


class SettingsError(LorankError):
    """Valid settings do not fit the model, the data or this machine."""


class RunFolderError(LorankError):
    """The run's folder cannot be used: it holds another run, or no run to resume."""
