"""Scores of ranks: functions from a model to one score per rank (higher = keep), and scorers that keep statistics."""

from lorank.scoring.ablation import AblationResult, ablation_scores, validation_loss
from lorank.scoring.ablation_scorer import AblationScorer
from lorank.scoring.balanced import Balanced, BalancedScorer, balance
from lorank.scoring.balanced_scores import balanced_scores
from lorank.scoring.context import Context, State, TrainingInfo
from lorank.scoring.gramians import GramianPair, measure_gramians
from lorank.scoring.mean_loss import mean_loss
from lorank.scoring.random_scorer import RandomScorer
from lorank.scoring.rotated import RotatedScorer
from lorank.scoring.saliency import saliency_scores
from lorank.scoring.scorer import Choose, Scorer, Scores
from lorank.scoring.sensitivity import SensitivityScorer
from lorank.scoring.successive_screening import screened_scores
from lorank.scoring.taylor import first_order_scores
from lorank.scoring.update_svd import UpdateSvd
from lorank.scoring.weight_gradient import WeightGradient, residual_gradients, weight_gradients
from lorank.scoring.work_sharding import Share

__all__ = [
    "AblationResult",
    "AblationScorer",
    "Balanced",
    "BalancedScorer",
    "Choose",
    "Context",
    "GramianPair",
    "RandomScorer",
    "RotatedScorer",
    "Scorer",
    "Scores",
    "SensitivityScorer",
    "Share",
    "State",
    "TrainingInfo",
    "UpdateSvd",
    "WeightGradient",
    "ablation_scores",
    "balance",
    "balanced_scores",
    "first_order_scores",
    "mean_loss",
    "measure_gramians",
    "residual_gradients",
    "saliency_scores",
    "screened_scores",
    "validation_loss",
    "weight_gradients",
]
