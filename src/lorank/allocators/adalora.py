"""AdaLoRA (Zhang et al., ICLR 2023, arXiv 2303.10512): prunes singular values by importance, on a cubic schedule.

    y = W x + s · P Λ Q x        P = B: (d_out, r)   Λ = diag(g)   Q = A: (r, d_in)

    S_i  = s(λ_i) + mean_j s(P_ji) + mean_j s(Q_ij)         smoothed sensitivity × uncertainty (scoring/sensitivity.py)
    loss + γ Σ (‖PᵀP − I‖² + ‖QQᵀ − I‖²)                    its gradient in closed form (orthogonality.py)
    b(t) = b0                                               t ≤ t_i
           b_T + (b0 − b_T)(1 − (t − t_i)/(T − t_i − t_f))³ between
           b_T                                              t ≥ T − t_f

Every ΔT steps between t_i and T − t_f, the singular values outside the b(t) best triplets are set to zero. Their
vectors are kept and the values may grow again, so a triplet can return until T − t_f. Then the budget is final: the
other triplets are removed with their optimiser moments, and the last t_f steps train the remaining ones.

Λ starts at zero and is trained by Adam at the main optimiser's learning rate, unclipped and without weight decay. P and
Q start at random values. In a new adapter, PEFT sets one of the two factors to zero; this factor is drawn from
N(0, 1/(3d)), where d is the length of its vectors. PEFT gives the other factor the same scale. At d = 768, the width of
the paper's model, it is the scale 0.02 of the paper's code. With Λ = 0 the output is the base model's. An adapter that
has already been trained keeps its weights and starts with Λ = 1. Sensitivities use the gradient of the whole loss,
including the regulariser, as in the paper.
"""

from __future__ import annotations

import math
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from lorank.allocators.base import Allocation, Allocator, Context, State, TrainingInfo
from lorank.allocators.budget import BudgetSetting
from lorank.allocators.gate_adam import adam_step_, resize_adam_, start_adam
from lorank.allocators.orthogonality import add_orthogonality_gradient_
from lorank.allocators.pruning_budget import final_budget, plan_to_keep, warn_if_nothing_to_prune
from lorank.allocators.resolved_budget import ResolvedBudget
from lorank.allocators.schedule import CubicSchedule
from lorank.allocators.settings import settings
from lorank.errors import ScheduleError
from lorank.lora import AdapterLayer, AdapterLayers
from lorank.scoring import SensitivityScorer
from lorank.scoring.sensitivity import BETA, rank_products


@settings(raises=ScheduleError)
class AdaLoRA(Allocator):
    """AdaLoRA. The adapter must start with more ranks than the budget: two or three times as many in the authors' runs.

    Args:
        t_init: t_i, optimiser steps before the budget begins to fall; None: 13 % of the run. ≥ 0.
        t_final: t_f, steps with the final ranks at the end of the run; None: 48 % of the run. ≥ 0.
        delta_t: ΔT, steps between two maskings; None: 0.2 % of the run, at least 1. ≥ 1.
        orthogonality: γ, the weight of the regulariser that keeps P and Q orthonormal: 0.1 (the paper: 0.1 to 0.5).
            ≥ 0.
        beta1: β₁, the decay rate of the sensitivity's moving average: 0.85. In (0, 1).
        beta2: β₂, the decay rate of the uncertainty's moving average: 0.85. In (0, 1).
        budget: b_T, the adapter's budget at the end, see :class:`~lorank.allocators.budget.Budget`; None: half of the
            ranks that the adapter was made with.

    Raises:
        ScheduleError: a setting is out of its range; or, at the start of a run, the phases are longer than the run.
        BudgetError: the budget cannot be parsed; or, at the start of a run, it does not fit the modules.
    """

    sees_gradients: ClassVar[bool] = True

    t_init: Annotated[int | None, Field(ge=0)] = None
    t_final: Annotated[int | None, Field(ge=0)] = None
    delta_t: Annotated[int | None, Field(ge=1)] = None
    orthogonality: Annotated[float, Field(ge=0)] = 0.1
    beta1: Annotated[float, Field(gt=0, lt=1)] = BETA
    beta2: Annotated[float, Field(gt=0, lt=1)] = BETA
    budget: BudgetSetting = None

    @property
    def _schedule(self) -> CubicSchedule:
        return CubicSchedule(self.t_init, self.t_final, self.delta_t)

    @property
    def _scorer(self) -> SensitivityScorer:
        return SensitivityScorer(self.beta1, self.beta2)

    def resolve_budget(self, layers: AdapterLayers, run: TrainingInfo) -> ResolvedBudget:
        return final_budget(self.budget, layers, run)

    def start(self, layers: AdapterLayers, run: TrainingInfo) -> State:
        self._schedule.check(run, "AdaLoRA")
        warn_if_nothing_to_prune("AdaLoRA", self.resolve_budget(layers, run), run)
        generator = torch.Generator().manual_seed((run.seed * 1_000_003 + 0xADA) % 2**63)
        values = []
        for layer in layers.values():
            new = not (layer.A.any() and layer.B.any())
            if new:
                _initialise_zero_factor_(layer, generator)
            dtype = torch.promote_types(layer.A.dtype, torch.float32)
            values.append(torch.full((layer.rank,), 0.0 if new else 1.0, dtype=dtype))
        gates = layers.learn_gates(torch.cat(values))
        return {**self._scorer.start(layers, run), **start_adam(gates.values)}

    def before_step(self, context: Context, state: State) -> None:
        layers = context.layers
        products = rank_products(layers)  # before the regulariser's gradient is added: it does not depend on λ
        if self.orthogonality:
            add_orthogonality_gradient_(layers, self.orthogonality)
        if context.step < self._schedule.end(context.run):
            self._scorer.measure_(layers, state, products)

    def after_step(self, context: Context, state: State) -> None:
        gates = context.layers.gates
        if gates is not None:
            adam_step_(gates.values, gates.grad, state, context.lr)

    def due(self, step: int, run: TrainingInfo) -> bool:
        return self._schedule.due(step, run)

    def allocate(self, context: Context, state: State) -> Allocation | None:
        run, schedule = context.run, self._schedule
        final = self.resolve_budget(context.layers, run)
        budget = final.relaxed(run.initial_ranks, schedule.fraction(context.step, run))
        return self._prune(context, state, budget, remove=context.step >= schedule.end(run))

    def after_resize(self, context: Context, state: State, origins: Tensor) -> None:
        resize_adam_(state, origins)
        self._scorer.after_resize(context, state, origins)

    def finish(self, context: Context, state: State) -> Allocation | None:
        """Removes the triplets outside the budget, if training has stopped before the budget was final."""
        budget = self.resolve_budget(context.layers, context.run)
        if budget.fits(context.layers.ranks) or not self._scorer.has_measured(state):
            return None
        return self._prune(context, state, budget, remove=True)

    def _prune(self, context: Context, state: State, budget: ResolvedBudget, *, remove: bool) -> Allocation:
        """Sets λ of the triplets outside ``budget`` to zero; with ``remove``, also removes these triplets."""
        ranks = context.layers.ranks
        scores = self._scorer.score(context, state).values
        kept = budget.keep_best(scores)
        gates = context.layers.gates
        if gates is not None:
            stays = torch.cat(
                [torch.isin(torch.arange(rank), torch.tensor(kept[name])) for name, rank in ranks.items()]
            )
            gates.values.masked_fill_(~stays.to(gates.values.device), 0.0)
        if remove:
            self._scorer.end(context, state)  # ranks are removed only once, so no more scores are needed
        used = budget.used({name: len(some) for name, some in kept.items()})
        return Allocation(plan_to_keep(kept, ranks) if remove else {}, scores, {"budget": used})


@torch.no_grad()
def _initialise_zero_factor_(layer: AdapterLayer, generator: torch.Generator) -> None:
    """Draws Gaussian vectors for the factor that is zero: B, or A for an embedding."""
    for weight, length in ((layer.A, layer.A.shape[1:].numel()), (layer.B, layer.B.shape[0])):
        if not weight.any():
            weight.copy_(torch.randn(weight.shape, generator=generator) / math.sqrt(3 * length))
