"""The errors of this folder."""

from lorank.errors import LorankError


class ModelError(LorankError):
    """The base model or its tokenizer cannot be loaded."""


class SettingsError(LorankError):
    """Settings that are right in themselves do not fit the model, the data or this machine."""


class RunFolderError(LorankError):
    """The run's folder cannot be used: it holds another run, or nothing to resume."""
