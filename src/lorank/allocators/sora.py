"""SoRA: sparse low-rank adaptation (Ding et al., EMNLP 2023, arXiv 2311.11696).

    y = W x + s · B (g ⊙ (A x))        loss L0 + λ ‖g‖₁, solved by proximal gradient steps on g

    g ← T_{η_t λ}(g − η_t ∂L0/∂g)      T_ξ(x) = sign(x) · max(|x| − ξ, 0)

A rank whose gate is exactly zero can be removed. At regular intervals these ranks are removed, with their optimiser
moments. η_t is the gate's own learning rate on the main optimiser's schedule; L0 is the task's loss, with unclipped
gradients.

The paper raises λ step by step and accepts the sparsity that results. Here the user gives a budget, and λ is adapted to
it. The budget must be met at step t_end. At every step, λ is chosen so that the largest gate outside the budget would
reach zero at t_end if all other values stayed constant,

    λ_t = |u|_(k) / (η_t (t_end − t + 1))        u = g − η_t ∂L0/∂g,  k gates outside the budget

After t_end λ is zero, so that the remaining ranks train without the penalty. The number of zero gates would be a poor
control signal: it stays 0 for a long time, and then many gates reach zero together. The distance to zero changes from
the first step on. If the user gives λ, it stays constant; at t_end the smallest ranks above the budget are pruned.

Gates start at one (the authors' code draws them from N(0, 1)). So the adapter's initial output does not change, and
only the data decide which ranks are pruned. The size of a rank's update is |g_i| ‖A_i‖ ‖B_i‖ s. The scale of g_i alone
means little, because the vectors can grow while the gate shrinks.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from lorank.allocators.base import Allocation, Allocator, Context, State, TrainingInfo
from lorank.allocators.budget import BudgetSetting
from lorank.allocators.pruning_budget import final_budget, plan_to_keep, warn_if_nothing_to_prune
from lorank.allocators.resolved_budget import ResolvedBudget
from lorank.allocators.settings import settings
from lorank.errors import ScheduleError
from lorank.lora import AdapterLayers

PRUNE_EVERY = 0.02
"""The interval between two removals of ranks, as a fraction of the run."""


@settings(raises=ScheduleError)
class SoRA(Allocator):
    """SoRA. The adapter must start with more ranks than the budget; the paper starts with twice as many.

    Args:
        l1: λ, the weight of ‖g‖₁ in the loss; None: adapted so that the budget is met by ``until``. > 0.
        gate_lr: η, the gates' learning rate at the peak of the main schedule, which scales it: 10. It is high because a
            gate's gradient is small (about 1e-3 on the model that comes with lorank), and a gate that does not move
            carries no information. > 0.
        until: the fraction of the run after which the budget is met and final. Above 0, at most 1.
        prune_every: optimiser steps between two removals of ranks whose gate is zero; None: 2 % of the run. ≥ 1.
        budget: the adapter's budget at the end, see :class:`~lorank.allocators.budget.Budget`; None: half of the ranks
            that the adapter was made with.

    Raises:
        ScheduleError: a setting is out of its range; or, while training, λ has switched off every rank.
        BudgetError: the budget cannot be parsed; or, at the start of a run, it does not fit the modules.
    """

    why_ranks_shrink: ClassVar[str] = "The penalty switches off more ranks than the budget requires: give a smaller l1"

    l1: Annotated[float | None, Field(gt=0)] = None
    gate_lr: Annotated[float, Field(gt=0)] = 10.0
    until: Annotated[float, Field(gt=0, le=1)] = 0.5
    prune_every: Annotated[int | None, Field(ge=1)] = None
    budget: BudgetSetting = None

    def resolve_budget(self, layers: AdapterLayers, run: TrainingInfo) -> ResolvedBudget:
        return final_budget(self.budget, layers, run)

    def start(self, layers: AdapterLayers, run: TrainingInfo) -> State:
        budget = self.resolve_budget(layers, run)
        if self.l1 is None:
            warn_if_nothing_to_prune("SoRA", budget, run)
        first = next(iter(layers.values())).A
        dtype = torch.promote_types(first.dtype, torch.float32)
        gates = layers.learn_gates(torch.ones(layers.total_rank, dtype=dtype)).values
        costs = [[c.costs[name] for name in layers] for c in budget.constraints]
        return {
            "costs": torch.tensor(costs, device=gates.device),  # (C, modules)
            "limits": torch.tensor([c.limit for c in budget.constraints], device=gates.device),  # (C,)
            "threshold": gates.new_zeros(()),
        }

    @torch.no_grad()
    def after_step(self, context: Context, state: State) -> None:
        gates = context.layers.gates
        if gates is None:
            return
        step_size = self.gate_lr * context.lr_factor
        moved = gates.values - step_size * gates.grad  # u, (R,)
        if self.l1 is not None:
            threshold = torch.full_like(moved[0], step_size * self.l1)
        else:
            threshold = self._threshold_for_budget(moved, context, state)
        gates.values.copy_(soft_threshold(moved, threshold))
        state["threshold"] = threshold

    def due(self, step: int, run: TrainingInfo) -> bool:
        end = self._end(run)
        last = end if self.l1 is None else run.total_steps - 1
        return step == end or (step <= last and step % self._prune_every(run) == 0)

    def allocate(self, context: Context, state: State) -> Allocation | None:
        step_size = self.gate_lr * context.lr_factor
        threshold = float(state["threshold"])
        details = {"l1": threshold / step_size if step_size > 0 else None, "gate_lr": step_size}
        allocation = self._prune(context, to_budget=context.step >= self._end(context.run))
        return replace(allocation, details={**details, **allocation.details})

    def finish(self, context: Context, state: State) -> Allocation | None:
        """Removes ranks above the budget (if training stopped early) and ranks whose gate has become zero."""
        allocation = self._prune(context, to_budget=True)
        return allocation if allocation.plan else None

    def _threshold_for_budget(self, moved: Tensor, context: Context, state: State) -> Tensor:
        """The threshold η_t λ_t for the adapted λ_t, ().

        Args:
            moved: u, (R,).
        """
        left = self._end(context.run) - context.step + 1
        if left < 1:
            return moved.new_zeros(())
        sizes, order = moved.abs().sort(descending=True, stable=True)  # (R,)
        ranks = torch.tensor(list(context.layers.ranks.values()), device=moved.device)  # (modules,)
        costs = state["costs"].repeat_interleave(ranks, dim=1, output_size=len(moved))[:, order]  # (C, R)
        over = costs.cumsum(1) > state["limits"].unsqueeze(1)  # (C, R), False up to a rank, then True
        return (sizes * over.any(0)).max() / left

    def _prune(self, context: Context, *, to_budget: bool) -> Allocation:
        """Removes the ranks whose gate is zero; with ``to_budget``, also the smallest ranks above the budget."""
        layers, run = context.layers, context.run
        budget = self.resolve_budget(layers, run)
        allowed = budget if to_budget else replace(budget, constraints=(), caps=layers.ranks)
        gates = {name: (torch.ones(0) if x.gate is None else x.gate.detach().abs()) for name, x in layers.items()}
        sizes = {
            name: gates[name].double()
            * layer.layout.norms(layer.A.detach().double(), layer.B.detach().double())  # (r,)
            * layer.scaling
            for name, layer in layers.items()
        }
        if not any(gate.any() for gate in gates.values()):
            raise ScheduleError(
                f"SoRA(l1={self.l1}, gate_lr={self.gate_lr}): at step {context.step} every gate is zero, so the whole "
                "adapter is switched off. Give a smaller l1, or no l1: then the penalty is adapted to the budget"
            )
        kept = {}
        for name, some in allowed.keep_best(sizes).items():
            alive = [rank for rank in some if gates[name][rank]]
            spare = [rank for rank in some if not gates[name][rank]]  # kept at zero if the minimum needs them
            kept[name] = sorted(alive + spare[: max(0, budget.minima[name] - len(alive))])
        plan = plan_to_keep(kept, layers.ranks)
        return Allocation(plan, gates, {"budget": budget.used({name: len(some) for name, some in kept.items()})})

    def _end(self, run: TrainingInfo) -> int:
        """t_end, the step at which the budget is met."""
        return max(1, round(self.until * run.total_steps))

    def _prune_every(self, run: TrainingInfo) -> int:
        return max(1, round(PRUNE_EVERY * run.total_steps)) if self.prune_every is None else self.prune_every


def soft_threshold(x: Tensor, threshold: Tensor) -> Tensor:
    """T_ξ(x) = sign(x) · max(|x| − ξ, 0), element by element."""
    return x.sign() * (x.abs() - threshold).clamp_min(0)
