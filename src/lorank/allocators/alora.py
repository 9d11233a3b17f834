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

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from lorank.allocators.base import Allocation, Allocator, Context, State, TrainingInfo
from lorank.allocators.budget import BudgetLike, as_budget
from lorank.allocators.resolved_budget import ResolvedBudget
from lorank.allocators.rounds import Rounds, check_choice
from lorank.errors import ScheduleError, ValidationBatchError
from lorank.lora import AdapterLayers, Plan
from lorank.scoring import AblationResult, ablation_scores, first_order_scores, screened_scores

FIRST_ORDER_SAMPLES = 128
"""|B_val| for ``first_order``: samples cost little there, and more of them win back what estimates lose
(``docs/scoring.md``)."""


@dataclass(frozen=True)
class ALoRA(Allocator):
    """ALoRA, with the paper's settings as defaults.

    Args:
        k1: K1, how long to train before the first round: 1 epoch. > 0.
        k2: K2, how long to train between rounds: 0.25 epoch. > 0.
        rounds: N_A, how many rounds at most: 8. ≥ 1. Rounds that would come at the run's last step or later are left
            out, since a rank needs training.
        unit: what ``k1`` and ``k2`` count, ``"epochs"`` or optimiser ``"steps"``.
        per_round: n_A, ranks pruned and given in each round, over all modules; None: as many as there are modules.
        terms: which terms of IS count: ``"both"`` (the paper's), ``"without"`` or ``"alone"``.
        scores: how IS is found: ``"first_order"`` (estimates by two backward passes, however many ranks there are),
            ``"exact"`` (the paper's: two evaluations per rank) or ``"screen"`` (estimates for all, exact evaluations
            until it is settled which ranks go: those that ``"exact"`` would prune, in less time where that can be).
        samples: |B_val| where rows are given and a batch is made of them; None: 32, the paper's, and 128 for
            ``first_order``. A ready batch is used as it is.
        retry_empty: whether a module at rank 0 may receive ranks again. It then counts as a module that lost none,
            behind all those that have a score.
        engine: of exact evaluations: ``"exact"`` (prefix reuse, same scores) or ``"reference"`` (plain forwards).
        budget: what the adapter may cost at any time, see :class:`~lorank.allocators.budget.Budget`; None: as many
            ranks as it was made with.

    Raises:
        ScheduleError: a setting out of its range.
        BudgetError: a budget that cannot be read; at the start of a run, one that does not fit the modules.
    """

    k1: float = 1.0
    k2: float = 0.25
    rounds: int = 8
    unit: Literal["epochs", "steps"] = "epochs"
    per_round: int | None = None
    terms: Literal["both", "without", "alone"] = "both"
    scores: Literal["first_order", "exact", "screen"] = "first_order"
    samples: int | None = None
    retry_empty: bool = False
    engine: Literal["exact", "reference"] = "exact"
    budget: BudgetLike = None

    needs_validation_batch: ClassVar[bool] = True

    @property
    def validation_samples(self) -> int:
        if self.samples is not None:
            return self.samples
        return FIRST_ORDER_SAMPLES if self.scores == "first_order" else super().validation_samples

    def __post_init__(self) -> None:
        Rounds.of(self).check()
        check_choice("ALoRA", "terms", self.terms, ("both", "without", "alone"))
        check_choice("ALoRA", "scores", self.scores, ("first_order", "exact", "screen"))
        check_choice("ALoRA", "engine", self.engine, ("exact", "reference"))
        if self.samples is not None and self.samples < 1:
            raise ScheduleError(f"ALoRA(samples={self.samples}): expected at least 1, or None for the default")
        object.__setattr__(self, "budget", as_budget(self.budget))

    def start(self, layers: AdapterLayers, run: TrainingInfo) -> State:
        Rounds.of(self).check_run(layers, run)
        return {}

    @property
    def own_backward(self) -> bool:
        return self.scores != "exact"

    def resolve_budget(self, layers: AdapterLayers, run: TrainingInfo) -> ResolvedBudget | None:
        return Rounds.of(self).resolve_budget(layers)

    def initial_plan(self, layers: AdapterLayers, run: TrainingInfo) -> Plan:
        return Rounds.of(self).initial_plan(layers)

    def due(self, step: int, run: TrainingInfo) -> bool:
        return Rounds.of(self).due(step, run)

    def allocate(self, context: Context, state: State) -> Allocation | None:
        if context.validation_batch is None:
            raise ValidationBatchError(
                "ALoRA scores ranks on a fixed batch of validation data: give validation_batch=… "
                "(the paper takes 32 samples)"
            )
        result = self._score(context, context.validation_batch)
        details = {
            "loss": result.baseline,
            "scored_by": self.scores,
            "evaluations": result.evaluations,
            "backward_passes": result.backward_passes,
            "engine": result.engine,
            "notice": result.notice,
            "scoring_seconds": result.seconds,
        }
        return Rounds.of(self).allocation(context.layers, result.scores, details)

    def _score(self, context: Context, batch: Mapping[str, Any]) -> AblationResult:
        model, layers = context.model, context.layers
        common: dict[str, Any] = {
            "terms": self.terms,
            "loss_fn": context.loss_fn,
            "progress": context.progress,
            "share": context.share,
        }
        if self.scores == "first_order":
            return first_order_scores(model, layers, batch, **common)
        if self.scores == "screen":
            rounds = Rounds.of(self)
            return screened_scores(
                model, layers, batch, lambda scores: rounds.lowest(layers, scores), engine=self.engine, **common
            )
        return ablation_scores(model, layers, batch, engine=self.engine, **common)
