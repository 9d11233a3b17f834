"""ARD-LoRA: adaptive rank dynamics (Shinwari & Usama, arXiv 2506.18267).

Every attention head h of every layer l, and every module without heads, has a LoRA of its own with a learned rank:

    r = max(1, round(r0 · α))       α ≥ 0, initially 1
    L = L_task + λ (Σ |α| + β Σ (α_t − α_{t−1})²)

Where the paper is silent: rank i of a group is multiplied by a soft mask, so that the loss reaches α,

    m_i = σ((r0·α − i − ½) / τ)        τ falls from ``tau_start`` to ``tau_end``

Stored are the ranks whose mask exceeds ε, and at least r; they move at most every ``resize_every`` steps, and only in
groups where that number has been another one for ``hold`` steps. A rank that enters has B = 0. ∂L/∂α follows from the
gates' gradients in closed form, as does the penalty's gradient, so that the loss that a loop reports is the task's own.
α has an Adam of its own; its learning rate follows the schedule of the user's optimiser (ranks settle as weights do).
The last resize rounds: r as above, of what is there; where a budget is named, of what is there the ranks with the
highest r0·α − i stay, as many as fit: rounded one by one, groups would leave a part of it unused. It comes after the
last step, or after the part ``settle`` of the run: then α and the masks stand still, and the weights of the ranks that
stay have the rest of the run to make up for those that went. In the end the masks are folded into B, and the heads of a
module become one plain LoRA.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import field, replace
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from lorank.allocators.adam import adam_step_, start_adam
from lorank.allocators.ard import controller, diagnostics
from lorank.allocators.ard.groups import base_ranks, group_caps, group_owners, group_sizes, stored_counts
from lorank.allocators.ard.masks import (
    layout,
    masks,
    penalty_gradient,
    rounded_ranks,
    stored_ranks,
    task_gradient,
    temperature,
)
from lorank.allocators.ard.rounding import at_least_one, clip_to_budget, plan_for_groups
from lorank.allocators.base import Allocation, Allocator, Context, State, TrainingInfo
from lorank.allocators.budget import BudgetSetting, resolve_budget
from lorank.allocators.resolved_budget import ResolvedBudget
from lorank.allocators.settings import settings
from lorank.errors import BudgetError, ScheduleError, ValidationBatchError
from lorank.lora import AdapterLayers, HeadGroups, Plan, head_groups
from lorank.scoring import validation_loss

logger = logging.getLogger("lorank")


@settings(raises=ScheduleError)
class ARDLoRA(Allocator):
    """ARD-LoRA, with the paper's settings as defaults.

    Args:
        r0: ranks of every group where α = 1; None: the rank that the adapter was made with, at most what a head can
            hold (its width). ≥ 1.
        heads: ``"auto"``: every attention head has a rank of its own, a module without heads has one; ``"module"``: all
            modules have one.
        head_overrides: per module name (or its end), its heads, or None for none, where they are not found by
            themselves.
        budget: what the ranks must fit at the end; λ is then driven towards it. None: whatever the penalty leaves.
            A rank of a head counts as one rank, and as the d_in + d_head (or d_head + d_out) numbers that it trains.
        l1: λ, the strength of the penalty: 0.01. ≥ 0. With a budget, what it begins with.
        tv: β, the weight of the penalty's temporal term: 0.1. ≥ 0.
        l1_term: whether the penalty has the term Σ|α|; off, only λ β Σ (α_t − α_{t−1})² is left (the paper's ablation).
        alpha_lr: η_α, of α's Adam: 5e-5, times where the optimiser's schedule is. > 0. An α moves by about this much
            in a step, so a short run needs a larger one (the run says so).
        tau_start: τ at the beginning, in ranks. > 0.
        tau_end: τ at the end, in ranks. > 0, at most ``tau_start``.
        epsilon: ε, the mask from which on a rank is there physically. Above 0, below ½.
        resize_every: steps between physical resizes. ≥ 1.
        hold: for how many steps in a row a group must need another number of ranks before it gets it. ≥ 1.
        min_rank: the fewest ranks of a group: 1, the paper's. 0 lets heads and modules go altogether.
        gain: how fast λ follows the budget. > 0.
        reach: the part of the run after which the ranks should be at the budget. Above 0, at most 1.
        settle: the part of the run after which the last resize comes. Above 0, at most 1: after the last step.

    Raises:
        ScheduleError: a setting out of its range.
    """

    r0: Annotated[int | None, Field(ge=1)] = None
    heads: Literal["auto", "module"] = "auto"
    head_overrides: Mapping[str, HeadGroups | None] = field(default_factory=dict)
    budget: BudgetSetting = None
    l1: Annotated[float, Field(ge=0)] = 0.01
    tv: Annotated[float, Field(ge=0)] = 0.1
    l1_term: bool = True
    alpha_lr: Annotated[float, Field(gt=0)] = 5e-5
    tau_start: Annotated[float, Field(gt=0)] = 0.5
    tau_end: Annotated[float, Field(gt=0)] = 0.1
    epsilon: Annotated[float, Field(gt=0, lt=0.5)] = 0.05
    resize_every: Annotated[int, Field(ge=1)] = 20
    hold: Annotated[int, Field(ge=1)] = 5
    min_rank: Annotated[int, Field(ge=0)] = 1
    gain: Annotated[float, Field(gt=0)] = 0.2
    reach: Annotated[float, Field(gt=0, le=1)] = 0.75
    settle: Annotated[float, Field(gt=0, le=1)] = 1.0

    def __post_init__(self) -> None:
        if self.tau_end > self.tau_start:
            raise ScheduleError(f"ARDLoRA(tau_end={self.tau_end}): expected at most tau_start={self.tau_start}")
        if self._lambda_follows_budget and self.l1 == 0:
            raise ScheduleError(
                "ARDLoRA(l1=0, budget=…): lambda is driven to the budget by factors, and 0 stays 0. Begin with a small "
                "one, e.g. l1=0.001, or leave the budget to the last resize with l1_term=False"
            )

    @property
    def _lambda_follows_budget(self) -> bool:
        """Whether λ follows a budget."""
        return self.budget is not None and self.l1_term

    def heads_of(self, layers: AdapterLayers) -> Mapping[str, HeadGroups]:
        return head_groups(layers, self.head_overrides) if self.heads == "auto" else {}

    def resolve_budget(self, layers: AdapterLayers, run: TrainingInfo) -> ResolvedBudget | None:
        limits = resolve_budget(self.budget, layers)
        if not self.min_rank and any(layer.min_rank for layer in layers.values()):
            raise ScheduleError("ARDLoRA(min_rank=0): a module with DoRA needs a rank; use min_rank=1")
        if limits is None:
            return None
        limits = replace(limits, minima={name: self.min_rank * size for name, size in group_sizes(layers).items()})
        if not limits.fits(limits.minima):
            used = ", ".join(
                f"{use['used']:g} of {use['limit']:g} {u}" for u, use in limits.used(limits.minima).items()
            )
            raise BudgetError(
                f"the budget cannot hold min_rank={self.min_rank} for each of the {sum(group_sizes(layers).values())} "
                f"groups ({used}): name a larger one (ranks of all heads count), or min_rank=0, or heads='module'"
            )
        return limits

    def initial_plan(self, layers: AdapterLayers, run: TrainingInfo) -> Plan:
        r0, caps = base_ranks(layers, run, self.r0), group_caps(layers)
        return plan_for_groups(layers, stored_ranks(r0, self.tau_start, self.epsilon, self.min_rank, caps))

    def due(self, step: int, run: TrainingInfo) -> bool:
        settling = self._last_resize_step(run)
        return step < run.total_steps and (step == settling or (step < settling and step % self.resize_every == 0))

    def _last_resize_step(self, run: TrainingInfo) -> int:
        """The step after which the ranks are rounded for good."""
        return max(1, round(self.settle * run.total_steps))

    def start(self, layers: AdapterLayers, run: TrainingInfo) -> State:
        r0, counts = base_ranks(layers, run, self.r0), stored_counts(layers)
        self._warn_of_slow_alpha(float(r0.max()), run)
        device = next(iter(layers.values())).A.device
        exact = torch.float32 if device.type == "mps" else torch.float64
        r0, counts, caps = r0.to(device, exact), counts.to(device), group_caps(layers).to(device)
        alpha = torch.ones_like(r0)
        member, position = layout(counts)
        layers.learn_gates(masks(r0, member, position, self.tau_start))
        state: State = {
            "alpha": alpha,
            "before": alpha.clone(),  # α one step ago
            "r0": r0,
            "caps": caps,
            "counts": counts,
            "member": member,
            "position": position,
            "held": torch.zeros_like(counts),
            "lambda": torch.tensor(self.l1, dtype=exact, device=device),
            **start_adam(alpha),
            **diagnostics.start_diagnostics(rounded_ranks(r0, self.min_rank, caps), float(r0.sum())),
        }
        limits = self.resolve_budget(layers, run)
        if limits is not None:
            state |= controller.start_control(limits, group_owners(layers), r0)
        return state

    def before_step(self, context: Context, state: State) -> None:
        if not context.step:
            diagnostics.record_initial_loss_(state, self._loss(context))

    @torch.no_grad()
    def after_step(self, context: Context, state: State) -> None:
        """α's own step, after the optimiser's; then the masks follow it."""
        gates, run = context.layers.gates, context.run
        assert gates is not None
        if context.step > self._last_resize_step(run):
            return
        alpha, r0, member, position = (state[key] for key in ("alpha", "r0", "member", "position"))
        # The forward pass had the masks of the step before.
        tau = temperature(context.step - 1, run.total_steps, self.tau_start, self.tau_end)
        gradient = torch.nan_to_num(gates.grad, nan=0.0, posinf=0.0, neginf=0.0)
        gradient = task_gradient(gradient, gates.values, r0, member, position, tau)  # (G,)
        gradient += penalty_gradient(alpha, state["before"], state["lambda"], self.tv, self.l1_term)
        state["before"] = alpha.clone()
        adam_step_(alpha, gradient, state, self.alpha_lr * context.lr_factor)
        alpha.clamp_min_(0)
        effective = r0 * alpha  # (G,)
        if self._lambda_follows_budget:
            target = controller.target_use(context.step, run.total_steps, state["budget.first"], self.reach)
            controller.update_lambda_(state, effective, self.l1, self.gain, target)
        self._set_masks(context, state)
        wanted = self._wanted(context, state)
        state["held"] = torch.where(wanted == state["counts"], 0, state["held"] + 1)
        diagnostics.count_reversals_(state, rounded_ranks(effective, self.min_rank, state["caps"]))

    @torch.no_grad()
    def allocate(self, context: Context, state: State) -> Allocation | None:
        if context.step == self._last_resize_step(context.run):
            return self._round(context, state)
        counts = torch.where(state["held"] >= self.hold, self._wanted(context, state), state["counts"])
        plan = plan_for_groups(context.layers, at_least_one(counts, state["r0"] * state["alpha"]))
        loss = self._loss(context)
        effective = state["r0"] * state["alpha"]
        rounded = rounded_ranks(effective, self.min_rank, state["caps"])
        at_minimum = self._fraction_at_minimum(state, rounded)
        found = diagnostics.diagnose_(state, float(effective.sum()), at_minimum, loss)
        news = diagnostics.warn_(
            state,
            found,
            context.step,
            strength=float(state["lambda"]),
            tv=self.tv,
            alpha_lr=self.alpha_lr,
            loss=math.nan if loss is None else loss,
        )
        if not plan and not news:
            return None
        return self._allocation(context, state, plan, rounded, {"signatures": found, "loss": loss})

    def after_resize(self, context: Context, state: State, origins: Tensor) -> None:
        counts = stored_counts(context.layers).to(state["counts"].device)
        state["held"] = torch.where(counts == state["counts"], state["held"], 0)
        state["counts"] = counts
        state["member"], state["position"] = layout(counts)
        self._set_masks(context, state)

    @torch.no_grad()
    def finish(self, context: Context, state: State) -> Allocation | None:
        return self._round(context, state)

    def _round(self, context: Context, state: State) -> Allocation:
        """The last resize. Of ranks that were rounded before it changes nothing."""
        effective = state["r0"] * state["alpha"]
        # A rank that was never trained is not worth storing, so at most what is there.
        limits = self.resolve_budget(context.layers, context.run)
        if limits is None:
            ranks = torch.minimum(rounded_ranks(effective, self.min_rank, state["caps"]), state["counts"]).cpu()
        else:
            ranks = clip_to_budget(limits, context.layers, state["counts"].cpu(), effective.cpu(), self.min_rank)
        ranks = at_least_one(ranks, effective.cpu())
        return self._allocation(context, state, plan_for_groups(context.layers, ranks), ranks, {"final": True})

    def _set_masks(self, context: Context, state: State) -> None:
        gates = context.layers.gates
        assert gates is not None
        tau = temperature(context.step, context.run.total_steps, self.tau_start, self.tau_end)
        gates.values.copy_(masks(state["r0"] * state["alpha"], state["member"], state["position"], tau))

    def _wanted(self, context: Context, state: State) -> Tensor:
        tau = temperature(context.step, context.run.total_steps, self.tau_start, self.tau_end)
        return stored_ranks(state["r0"] * state["alpha"], tau, self.epsilon, self.min_rank, state["caps"])

    def _fraction_at_minimum(self, state: State, rounded: Tensor) -> float:
        """The part of the groups that has fallen to its minimum, 0 where a budget leaves no choice."""
        least = torch.full_like(state["r0"], self.min_rank)  # (G,)
        could = rounded_ranks(state["r0"], self.min_rank, state["caps"]) > self.min_rank  # (G,)
        if not could.any() or (self.budget is not None and float(controller.soft_use(state, least)) > 0.9):
            return 0.0
        return float((rounded[could] <= self.min_rank).double().mean())

    def _loss(self, context: Context) -> float | None:
        if context.validation_batch is None:
            return None
        try:
            loss = float(validation_loss(context.model, context.layers, context.validation_batch, context.loss_fn))
        except ValidationBatchError:  # it was scored at the start: now it is not finite
            loss = math.nan
        return float(context.mean(torch.tensor([loss], dtype=torch.float64)))

    def _allocation(
        self, context: Context, state: State, plan: Plan, ranks: Tensor, more: Mapping[str, Any]
    ) -> Allocation:
        """With, per rank that is there, r0·α − i as its score, and the ranks of every head in the history."""
        alpha, effective, layers = state["alpha"], (state["r0"] * state["alpha"]).cpu(), context.layers
        scores = effective[state["member"].cpu()] - state["position"].cpu()  # (R,)
        by_head = torch.split(ranks.cpu(), list(group_sizes(layers).values()))
        head_ranks = {name: some.tolist() for name, some in zip(layers, by_head, strict=True)}
        details = {
            "lambda": float(state["lambda"]),
            "tau": temperature(context.step, context.run.total_steps, self.tau_start, self.tau_end),
            "alpha": {"min": float(alpha.min()), "mean": float(alpha.mean()), "max": float(alpha.max())},
            "soft_ranks": float(effective.sum()),
            "trained_parameters": sum(
                layer.rank_parameters * (plan[name].rank if name in plan else layer.rank)
                for name, layer in layers.items()
            ),
            "head_ranks": head_ranks,
            **more,
        }
        return Allocation(
            plan,
            dict(zip(layers, torch.split(scores, list(layers.ranks.values())), strict=True)),
            details,
            active={name: sum(some) for name, some in head_ranks.items()},
        )

    def _warn_of_slow_alpha(self, r0: float, run: TrainingInfo) -> None:
        reach = self.alpha_lr * run.total_steps * r0
        if reach < 1:
            logger.warning(
                "ARDLoRA will not move a single rank: with alpha_lr=%g and %d steps an r0·alpha of %g can move by "
                "about %.2g ranks, half of that under a learning rate that decays. Name a larger one, e.g. "
                "alpha_lr=%.1g, with which a rank can halve",
                self.alpha_lr,
                run.total_steps,
                r0,
                reach,
                1 / run.total_steps,
            )
