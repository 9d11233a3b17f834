"""Pictures and pages from rank histories; history files are their only input."""

from lorank.report.heatmap import rank_heatmap

__all__ = ["rank_heatmap"]
