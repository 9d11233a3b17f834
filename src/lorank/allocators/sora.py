"""SoRA: sparse low-rank adaptation (Ding et al., EMNLP 2023, arXiv 2311.11696).

    y = W x + s · B (g ⊙ (A x))        loss L0 + λ ‖g‖₁, solved by proximal gradient steps on g

    g ← T_{η_t λ}(g − η_t ∂L0/∂g)      T_ξ(x) = sign(x) · max(|x| − ξ, 0)

A gate that is exactly zero is a rank that can go, and from time to time those ranks are removed, with their optimiser
moments. η_t is the gate's own learning rate on the main optimiser's schedule; L0 is the task's loss, unclipped.

The paper raises λ step by step and takes the sparsity that comes out. Here the user names a budget, so λ is steered: at
every step it is what would, if nothing else moved, bring the largest gate outside the budget to zero at the step t_end
where the budget is to be met,

    λ_t = |u|_(k) / (η_t (t_end − t + 1))        u = g − η_t ∂L0/∂g,  k gates outside the budget

and zero afterwards, so that what is left trains without the penalty. Counting the gates that are zero would tell
nothing until the first ones arrive there, and then they arrive together; the distance left tells it all the way.
A λ that is named stays as it is; what is then still over the budget at t_end goes by size.

Gates start at one (the authors' code draws them from N(0, 1)): the adapter starts as it is, and which ranks go is
decided by the data alone. The size of a rank's update is |g_i| ‖A_i‖ ‖B_i‖ s, for the scale of g_i alone means little:
what the gate loses the vectors may have gained.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

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


@settings(raises=ScheduleError)
class SoRA(Allocator):
    """SoRA. Make the adapter with more ranks than the budget; the paper starts at twice as many.

    Args:
        l1: λ, the weight of ‖g‖₁ in the loss; None: steered, so that the budget is met by ``until``. > 0.
        gate_lr: η, the gates' learning rate at the peak of the main schedule, which scales it: 10. A gate's gradient is
            small (about 1e-3 on the model that lorank carries), and a gate that it does not move says nothing. > 0.
        until: the part of the run after which the budget is met, and final. Above 0, at most 1.
        prune_every: optimiser steps between two removals of ranks whose gate is zero; None: 2 % of the run. ≥ 1.
        budget: what the adapter may cost at the end, see :class:`~lorank.allocators.budget.Budget`; None: half of the
            ranks that it was made with.

    Raises:
        ScheduleError: a setting out of its range; while training, a λ that has switched every rank off.
        BudgetError: a budget that cannot be read; at the start of a run, one that does not fit the modules.
    """

    l1: Annotated[float | None, Field(gt=0)] = None
    gate_lr: Annotated[float, Field(gt=0)] = 10.0
    until: Annotated[float, Field(gt=0, le=1)] = 0.5
    prune_every: Annotated[int | None, Field(ge=1)] = None
    budget: BudgetSetting = None

    def resolve_budget(self, layers: AdapterLayers, run: TrainingInfo) -> ResolvedBudget:
        return final_budget(self.budget, layers, run)

    def start(self, layers: AdapterLayers, run: TrainingInfo) -> State:
        limits = self.resolve_budget(layers, run)
        if self.l1 is None:
            warn_if_nothing_to_prune("SoRA", limits, run)
        first = next(iter(layers.values())).A
        dtype = torch.promote_types(first.dtype, torch.float32)
        gates = layers.learn_gates(torch.ones(layers.total_rank, dtype=dtype)).values
        costs = [[c.costs[name] for name in layers] for c in limits.constraints]
        return {
            "costs": torch.tensor(costs, device=gates.device),  # (C, modules)
            "limits": torch.tensor([c.limit for c in limits.constraints], device=gates.device),  # (C,)
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
        """What is over the budget (training stopped early) or has come to zero since the last removal goes."""
        allocation = self._prune(context, to_budget=True)
        return allocation if allocation.plan else None

    def _threshold_for_budget(self, moved: Tensor, context: Context, state: State) -> Tensor:
        """η_t λ_t, ().

        Args:
            moved: u, (R,).
        """
        left = self._end(context.run) - context.step + 1
        if left < 1:
            return moved.new_zeros(())
        sizes, order = moved.abs().sort(descending=True, stable=True)  # (R,)
        ranks = torch.tensor(list(context.layers.ranks.values()), device=moved.device)  # (modules,)
        costs = state["costs"].repeat_interleave(ranks, dim=1, output_size=len(moved))[:, order]  # (C, R)
        over = costs.cumsum(1) > state["limits"].unsqueeze(1)  # (C, R), true from some rank on
        return (sizes * over.any(0)).max() / left

    def _prune(self, context: Context, *, to_budget: bool) -> Allocation:
        """Removes the ranks whose gate is zero, and with ``to_budget`` those with the smallest updates over it."""
        layers, run = context.layers, context.run
        limits = self.resolve_budget(layers, run)
        allowed = limits if to_budget else replace(limits, constraints=(), caps=layers.ranks)
        gates = {name: (torch.ones(0) if x.gate is None else x.gate.detach().abs()) for name, x in layers.items()}
        sizes = {
            name: gates[name].double()
            * layer.A.detach().double().norm(dim=1)  # (r, d_in) → (r,)
            * layer.B.detach().double().norm(dim=0)  # (d_out, r) → (r,)
            * layer.scaling
            for name, layer in layers.items()
        }
        if not any(gate.any() for gate in gates.values()):
            raise ScheduleError(
                f"SoRA(l1={self.l1}, gate_lr={self.gate_lr}): at step {context.step} every gate is zero, so the whole "
                "adapter is switched off. Name a smaller l1, or none: the penalty is then steered by the budget"
            )
        kept = {}
        for name, some in allowed.keep_best(sizes).items():
            alive = [rank for rank in some if gates[name][rank]]
            spare = [rank for rank in some if not gates[name][rank]]  # what the module cannot be without stays at zero
            kept[name] = sorted(alive + spare[: max(0, limits.minima[name] - len(alive))])
        plan = plan_to_keep(kept, layers.ranks)
        return Allocation(plan, gates, {"budget": limits.used({name: len(some) for name, some in kept.items()})})

    def _end(self, run: TrainingInfo) -> int:
        """t_end, the step at which the budget is met."""
        return max(1, round(self.until * run.total_steps))

    def _prune_every(self, run: TrainingInfo) -> int:
        return max(1, round(PRUNE_EVERY * run.total_steps)) if self.prune_every is None else self.prune_every


def soft_threshold(x: Tensor, threshold: Tensor) -> Tensor:
    """T_ξ(x) = sign(x) · max(|x| − ξ, 0), element by element."""
    return x.sign() * (x.abs() - threshold).clamp_min(0)
