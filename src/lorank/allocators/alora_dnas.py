"""ALoRA-DNAS, a variant in the ALoRA paper (arXiv 2403.16187): its rounds, with gates found as in DARTS (1806.09055).

    y = W x + s · B (g ⊙ (A x))        g = 2 σ(a'), a' from 0, so that g starts at 1

A and B learn on the training data by the user's optimiser, a' on a second split by an Adam of its own, in turns; the
score of a rank is its gate (allocators/gate_search.py). Rounds, budget and everything that a score does not decide are
ALoRA's (allocators/rounds.py). After the last round nothing is searched any more: gates stay as they were found, A and
B go on learning under them, and at the end the gates are folded into B.
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
    """ALoRA with gates that are searched for. Give it the second split as ``validation_batch``, all its rows.

    Args:
        k1, k2, rounds, unit, per_round, retry_empty, budget: of the rounds, see
            :class:`~lorank.allocators.rounds.RoundAllocator`.
        gate_lr: learning rate of a': 1e-2. > 0.
        search_every: optimiser steps between two steps of a': 1, as in DARTS. ≥ 1.
        search_rows: rows of the split in each of them, taken in turn: 8. ≥ 1.

    Raises:
        ScheduleError: a setting out of its range.
        BudgetError: a budget that cannot be read; at the start of a run, one that does not fit the modules.
        ValidationBatchError: while training, a loss on the split that is not finite.
    """

    gate_lr: Annotated[float, Field(gt=0)] = 1e-2
    search_every: Annotated[int, Field(ge=1)] = 1
    search_rows: Annotated[int, Field(ge=1)] = 8

    @property
    def scorer(self) -> Scorer:
        return GateSearchScorer(self.gate_lr, self.search_every, self.search_rows)
