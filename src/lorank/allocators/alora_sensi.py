"""ALoRA-Sensi, a variant in the ALoRA paper (arXiv 2403.16187): ALoRA's rounds, with AdaLoRA's score of a rank.

    S_i = s(λ_i) + mean_j s(A_ij) + mean_j s(B_ji)        s = smoothed sensitivity × uncertainty, λ = 1

The score uses the gradients of training (scoring/sensitivity.py): it needs no held-out batch and no additional forward
pass. Gates would be one, so there are none; the gradient of λ follows from that of A. The moving averages of a new rank
start at 0. The rounds, the budget and all else are those of ALoRA (allocators/rounds.py).
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from lorank.allocators.rounds import RoundAllocator
from lorank.allocators.settings import settings
from lorank.errors import ScheduleError
from lorank.scoring import Scorer, SensitivityScorer
from lorank.scoring.sensitivity import BETA


@settings(raises=ScheduleError)
class ALoRASensi(RoundAllocator):
    """ALoRA with sensitivity scores.

    Args:
        k1, k2, rounds, unit, per_round, retry_empty, budget, new_ranks, second_moments, per_parameter: settings of the
            rounds, see :class:`~lorank.allocators.rounds.RoundAllocator`.
        beta1: β₁, the decay rate of the sensitivity's moving average: 0.85, as in AdaLoRA. In (0, 1).
        beta2: β₂, the decay rate of the uncertainty's moving average: 0.85. In (0, 1).

    Raises:
        ScheduleError: a setting is out of its range.
        BudgetError: the budget cannot be parsed; or, at the start of a run, it does not fit the modules.
    """

    beta1: Annotated[float, Field(gt=0, lt=1)] = BETA
    beta2: Annotated[float, Field(gt=0, lt=1)] = BETA

    @property
    def scorer(self) -> Scorer:
        return SensitivityScorer(self.beta1, self.beta2)
