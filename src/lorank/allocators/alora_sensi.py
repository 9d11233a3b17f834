"""ALoRA-Sensi, a variant in the ALoRA paper (arXiv 2403.16187): its rounds, with AdaLoRA's score of a rank.

    S_i = s(λ_i) + mean_j s(A_ij) + mean_j s(B_ji)        s = smoothed sensitivity × uncertainty, λ = 1

from the gradients of training itself (scoring/sensitivity.py): no held-out batch, no forward pass of its own. Gates are
one, so none is there; λ's gradient follows from A's. A rank that is new starts with nothing measured. Rounds, budget
and everything that a rank's score does not decide are ALoRA's (allocators/rounds.py).
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
        k1, k2, rounds, unit, per_round, retry_empty, budget: of the rounds, see
            :class:`~lorank.allocators.rounds.RoundAllocator`.
        beta1: β₁, how slowly the sensitivity forgets: 0.85, as in AdaLoRA. In (0, 1).
        beta2: β₂, the same for its uncertainty: 0.85. In (0, 1).

    Raises:
        ScheduleError: a setting out of its range.
        BudgetError: a budget that cannot be read; at the start of a run, one that does not fit the modules.
    """

    beta1: Annotated[float, Field(gt=0, lt=1)] = BETA
    beta2: Annotated[float, Field(gt=0, lt=1)] = BETA

    @property
    def scorer(self) -> Scorer:
        return SensitivityScorer(self.beta1, self.beta2)
