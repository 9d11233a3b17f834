"""ALoRA-DNAS, a variant in the ALoRA paper (arXiv 2403.16187): ALoRA's rounds, with gates searched as in DARTS
(arXiv 1806.09055).

    y = W x + s · B (g ⊙ (A x))        g = 2 σ(a'), a' starts at 0, so g starts at 1

The user's optimiser trains A and B on the training data. In alternation, a separate Adam trains a' on a second split.
The score of a rank is its gate (allocators/gate_search.py). The rounds, the budget and all else are those of ALoRA
(allocators/rounds.py). The search ends with the last round. Then the gates stay constant while A and B continue to
train; at the end the gates are folded into B.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from lorank.allocators.gate_search import GateSearchScorer
from lorank.allocators.rounds import RoundAllocator
from lorank.allocators.settings import settings
from lorank.errors import ScheduleError
from lorank.scoring import Scorer


@settings(raises=ScheduleError)
class ALoRADNAS(RoundAllocator):
    """ALoRA with searched gates. It needs the second split, with all its rows, as ``validation_batch``.

    Args:
        k1, k2, rounds, unit, per_round, retry_empty, budget, new_ranks, second_moments, per_parameter: settings of the
            rounds, see :class:`~lorank.allocators.rounds.RoundAllocator`.
        gate_lr: learning rate of a': 1e-2. > 0.
        search_every: optimiser steps between two steps of a': 1, as in DARTS. ≥ 1.
        search_rows: rows of the second split that each step of a' uses, taken in turn: 8. ≥ 1.

    Raises:
        ScheduleError: a setting is out of its range.
        BudgetError: the budget cannot be parsed; or, at the start of a run, it does not fit the modules.
        ValidationBatchError: while training, the loss on the second split is NaN or infinite.
    """

    gate_lr: Annotated[float, Field(gt=0)] = 1e-2
    search_every: Annotated[int, Field(ge=1)] = 1
    search_rows: Annotated[int, Field(ge=1)] = 8

    @property
    def scorer(self) -> Scorer:
        return GateSearchScorer(self.gate_lr, self.search_every, self.search_rows)
