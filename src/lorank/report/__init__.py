"""Pictures of ranks and of results, and the report page, drawn from plain numbers."""

from lorank.report.curve import Line, curve_picture
from lorank.report.picture import ranks_picture

__all__ = ["Line", "curve_picture", "ranks_picture"]
