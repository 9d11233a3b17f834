"""ALoRA-Sensi, a variant in the ALoRA paper (arXiv 2403.16187): its rounds, with AdaLoRA's score of a rank.

    S_i = s(λ_i) + mean_j s(A_ij) + mean_j s(B_ji)        s = smoothed sensitivity × uncertainty, λ = 1

from the gradients of training itself (scoring/sensitivity.py): no held-out batch, no forward pass of its own. Gates are
one, so none is there; λ's gradient follows from A's. A rank that is new starts with nothing measured. Rounds, budget
and everything that a rank's score does not decide are ALoRA's (allocators/rounds.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from lorank.allocators.base import Allocation, Allocator, Context, State, TrainingInfo
from lorank.allocators.budget import BudgetLike, as_budget
from lorank.allocators.resolved_budget import ResolvedBudget
from lorank.allocators.rounds import Rounds
from lorank.errors import ScheduleError
from lorank.lora import AdapterLayers, Plan
from lorank.scoring.sensitivity import (
    BETA,
    drop_sensitivity_,
    rank_products,
    resize_sensitivity_,
    sensitivity_scores,
    start_sensitivity,
    update_sensitivity_,
)


@dataclass(frozen=True)
class ALoRASensi(Allocator):
    """ALoRA with sensitivity scores.

    Args:
        k1: K1, how long to train before the first round: 1 epoch. > 0.
        k2: K2, how long to train between rounds: 0.25 epoch. > 0.
        rounds: N_A, how many rounds at most: 8. ≥ 1.
        unit: what ``k1`` and ``k2`` count, ``"epochs"`` or optimiser ``"steps"``.
        per_round: n_A, ranks pruned and given in each round, over all modules; None: as many as there are modules.
        retry_empty: whether a module at rank 0 may receive ranks again.
        beta1: β₁, how slowly the sensitivity forgets: 0.85, as in AdaLoRA. In (0, 1).
        beta2: β₂, the same for its uncertainty: 0.85. In (0, 1).
        budget: what the adapter may cost at any time; None: as many ranks as it was made with.

    Raises:
        ScheduleError: a setting out of its range.
        BudgetError: a budget that cannot be read; at the start of a run, one that does not fit the modules.
    """

    sees_gradients: ClassVar[bool] = True

    k1: float = 1.0
    k2: float = 0.25
    rounds: int = 8
    unit: Literal["epochs", "steps"] = "epochs"
    per_round: int | None = None
    retry_empty: bool = False
    beta1: float = BETA
    beta2: float = BETA
    budget: BudgetLike = None

    def __post_init__(self) -> None:
        Rounds.of(self).check()
        for name in ("beta1", "beta2"):
            if not 0 < getattr(self, name) < 1:
                raise ScheduleError(f"ALoRASensi({name}={getattr(self, name)}): expected a number between 0 and 1")
        object.__setattr__(self, "budget", as_budget(self.budget))

    def start(self, layers: AdapterLayers, run: TrainingInfo) -> State:
        Rounds.of(self).check_run(layers, run)
        return start_sensitivity(layers)

    def resolve_budget(self, layers: AdapterLayers, run: TrainingInfo) -> ResolvedBudget | None:
        return Rounds.of(self).resolve_budget(layers)

    def initial_plan(self, layers: AdapterLayers, run: TrainingInfo) -> Plan:
        return Rounds.of(self).initial_plan(layers)

    def due(self, step: int, run: TrainingInfo) -> bool:
        return Rounds.of(self).due(step, run)

    def before_step(self, context: Context, state: State) -> None:
        if context.step < Rounds.of(self).last(context.run):
            update_sensitivity_(state, context.layers, rank_products(context.layers), self.beta1, self.beta2)

    def allocate(self, context: Context, state: State) -> Allocation | None:
        return Rounds.of(self).allocation(context.layers, sensitivity_scores(state, context.layers), {})

    def after_resize(self, context: Context, state: State, origins: Tensor) -> None:
        if context.step < Rounds.of(self).last(context.run):
            resize_sensitivity_(state, context.layers, origins)
        else:
            drop_sensitivity_(state)
