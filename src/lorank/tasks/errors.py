"""The error that tasks raise."""

from lorank.errors import LorankError


class DataError(LorankError):
    """A data set, a split or a column does not exist, is empty, or cannot be read."""
