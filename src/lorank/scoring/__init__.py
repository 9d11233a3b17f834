"""What each rank is worth: functions from a model to one score per rank, higher = keep."""

from lorank.scoring.ablation import AblationResult, ablation_scores, validation_loss
from lorank.scoring.first_order import first_order_scores
from lorank.scoring.gate_gradient import gate_gradient_scores
from lorank.scoring.screen import screened_scores
from lorank.scoring.sharing import Share
from lorank.scoring.weight_gradient import weight_gradient_singular_values

__all__ = [
    "AblationResult",
    "Share",
    "ablation_scores",
    "first_order_scores",
    "gate_gradient_scores",
    "screened_scores",
    "validation_loss",
    "weight_gradient_singular_values",
]
