"""Pictures of ranks and of results, drawn from plain numbers."""

from lorank.report.heatmap import rank_heatmap

__all__ = ["rank_heatmap"]
