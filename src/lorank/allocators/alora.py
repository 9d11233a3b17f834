"""ALoRA: allocating low-rank adaptation (Liu et al., NAACL 2024, arXiv 2403.16187).

    train K1 epochs
    repeat N_A times:
        IS(r) = S(M) − S(M without r) + S(M with r alone)   for every rank r of every module, on one fixed batch B_val
        prune the n_A ranks with the lowest IS
        give n_A new ranks to the modules that lost none this round
        train K2 epochs

S is the negative cross-entropy; gates are one and frozen. IS is found by first-order estimates on 128 samples unless
``scores="exact"`` asks for the paper's own evaluations on 32: against exact scores on 512 samples the estimates are
on average as close, at about a thirtieth of the cost (``docs/scoring.md``). The budget R_target = Σ r_m holds from the
first step: the run starts with the ranks that the adapter was made with (the paper: 8 everywhere), or with a budget
that is named, as evenly as it allows.

Where the paper is silent: n_A counts over all adapted modules. A module may fall to rank 0; it then has no score, so
it counts as neither pruned nor important and receives nothing, unless ``retry_empty``. Exact ties are broken by module
order, then rank order. A module that is full (r = min(d_in, d_out)) receives nothing, and its share goes to the others.
If every module lost a rank, or every module that lost none is full, the total shrinks; a round never prunes the
last rank. Under a named budget gifts are
dealt as long as it has room for them, instead of n_A: a rank costs more parameters in one module than in another, so
the number of ranks may change while the budget holds in every unit; what one round leaves over the next one gives. A
module that cannot do without its last rank (DoRA) keeps it, and the next lowest rank is pruned. A new rank has A as at
first initialisation, B = 0 and optimiser moments at zero. Where the length of an epoch is unknown, the run counts as
ten epochs, the paper's longest.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from lorank.allocators.rounds import RoundAllocator
from lorank.allocators.settings import settings
from lorank.errors import ScheduleError
from lorank.scoring import AblationScorer, Scorer


@settings(raises=ScheduleError)
class ALoRA(RoundAllocator):
    """ALoRA, with the paper's settings as defaults.

    Args:
        k1, k2, rounds, unit, per_round, retry_empty, budget: of the rounds, see
            :class:`~lorank.allocators.rounds.RoundAllocator`.
        terms: which terms of IS count: ``"both"`` (the paper's), ``"without"`` or ``"alone"``.
        scores: how IS is found: ``"first_order"`` (estimates by two backward passes, however many ranks there are),
            ``"exact"`` (the paper's: two evaluations per rank) or ``"screen"`` (estimates for all, exact evaluations
            until it is settled which ranks go: those that ``"exact"`` would prune, in less time where that can be).
        samples: |B_val| where rows are given and a batch is made of them; None: 32, the paper's, and 128 for
            ``first_order``. A ready batch is used as it is. ≥ 1.
        engine: of exact evaluations: ``"exact"`` (prefix reuse, same scores) or ``"reference"`` (plain forwards).

    Raises:
        ScheduleError: a setting out of its range.
        BudgetError: a budget that cannot be read; at the start of a run, one that does not fit the modules.
    """

    terms: Literal["both", "without", "alone"] = "both"
    scores: Literal["first_order", "exact", "screen"] = "first_order"
    samples: Annotated[int | None, Field(ge=1)] = None
    engine: Literal["exact", "reference"] = "exact"

    @property
    def scorer(self) -> Scorer:
        return AblationScorer(self.scores, self.terms, self.samples, self.engine)
