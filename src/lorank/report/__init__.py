"""Pictures of ranks and of results, drawn from plain numbers."""

from lorank.report.curve import Line, curve_picture
from lorank.report.heatmap import rank_heatmap

__all__ = ["Line", "curve_picture", "rank_heatmap"]
