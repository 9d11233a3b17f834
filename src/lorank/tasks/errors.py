"""The one error of this folder."""

from lorank.errors import LorankError


class DataError(LorankError):
    """A data set, a split or a column that was asked for is not there, is empty, or cannot be read."""
