"""ARD-LoRA: adaptive rank dynamics (Shinwari & Usama, arXiv 2506.18267).

Every attention head h of every layer l, and every module without heads, has a LoRA of its own with a learned rank:

    r = max(1, round(r0 · α))       α ≥ 0, initially 1
    L = L_task + λ (Σ |α| + β Σ (α_t − α_{t−1})²)

A head, or a module without heads, is called a group. The paper does not say how the loss depends on α. Here a soft mask
multiplies rank i of a group:

    m_i = σ((r0·α − i − ½) / τ)        τ falls from ``tau_start`` to ``tau_end``

The ranks whose mask exceeds ε are stored, and at least r ranks. The layers are resized at most every ``resize_every``
steps, and only in groups whose required number of ranks has differed from the stored number for ``hold`` steps. A new
rank has B = 0. The gradient ∂L/∂α follows in closed form from the gates' gradients. The penalty's gradient also has a
closed form, so the loss that a loop reports is the task's loss. A separate Adam updates α. Its learning rate follows
the schedule of the user's optimiser, so that ranks converge together with the weights.

The last resize rounds the stored ranks to r as above. If a budget is given, the stored ranks with the highest r0·α − i
are kept instead, as many as fit; rounding each group on its own would leave a part of the budget unused. The last
resize comes after the last step, or after the fraction ``settle`` of the run. Afterwards α and the masks are constant,
and the remaining ranks are trained for the rest of the run to compensate for the removed ones. At the end the masks are
folded into B, and the heads of a module become one plain LoRA.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import field, replace
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from lorank.allocators.ard import controller, diagnostics
from lorank.allocators.ard.groups import base_ranks, group_caps, group_owners, group_sizes, stored_counts
from lorank.allocators.ard.masks import (
    effective_of_stored,
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
from lorank.allocators.gate_adam import adam_step_, start_adam
from lorank.allocators.new_ranks import SAMPLES, NewRanks, try_directions, with_directions
from lorank.allocators.resolved_budget import ResolvedBudget
from lorank.allocators.settings import settings
from lorank.errors import BudgetError, ScheduleError, ValidationBatchError
from lorank.lora import AdapterLayers, HeadGroups, Plan, SecondMoments, head_groups
from lorank.scoring import validation_loss

logger = logging.getLogger("lorank")

ALPHA_TRAVEL = 2.0
"""α's learning rate times the number of steps, by default. With linear decay α can then change by 1."""

RESIZE_EVERY, HOLD = 0.02, 0.005
"""The interval between two resizes, and the time for which a group must need another rank, as fractions of the run."""


@settings(raises=ScheduleError)
class ARDLoRA(Allocator):
    """ARD-LoRA, with the paper's settings as defaults, except for the durations.

    Args:
        r0: ranks of every group at α = 1; None: the rank that the adapter was made with, but at most the width of the
            head. ≥ 1.
        heads: ``"auto"``: every attention head has its own rank, and a module without heads has one rank;
            ``"module"``: every module has one rank.
        head_overrides: per module name (or the end of a name), its heads, or None for a module without heads. For
            modules whose heads are not found automatically.
        budget: the budget at the end of the run; λ is then adapted to it. None: only the penalty decides. A rank of a
            head counts as one rank, and as d_in + d_head (or d_head + d_out) trained parameters.
        l1: λ, the strength of the penalty: 0.01. ≥ 0. With a budget, the initial value of λ.
        tv: β, the weight of the penalty's temporal term: 0.1. ≥ 0.
        l1_term: whether the penalty has the term Σ|α|; if False, only λ β Σ (α_t − α_{t−1})² remains (the paper's
            ablation).
        alpha_lr: η_α, the learning rate of α's Adam, multiplied by the factor of the optimiser's schedule; None: 2 over
            the number of steps, so that α can fall from 1 to 0 in a run with linear decay (at 40,000 steps, the paper's
            5e-5). > 0. α changes by about this value in a step, so a low value moves no rank in a short run (lorank
            then logs a warning).
        tau_start: τ at the beginning, in ranks. > 0.
        tau_end: τ at the end, in ranks. > 0, at most ``tau_start``.
        epsilon: ε, the lowest mask with which a rank is stored. Above 0, below ½.
        resize_every: steps between resizes of the layers; None: 2 % of the run, at least 1. ≥ 1.
        hold: for how many steps in a row a group must need another number of ranks before it is resized; None: 0.5 % of
            the run, at least 1. ≥ 1.
        min_rank: the lowest rank of a group: 1, as in the paper. With 0, heads and modules can lose all ranks.
        gain: how fast λ follows the budget. > 0.
        reach: the fraction of the run after which the ranks should meet the budget. Above 0, at most 1.
        settle: the fraction of the run after which the last resize comes. Above 0, at most 1 (after the last step).
        new_ranks: how A begins at ranks that enter during the run: ``"random"``, as PEFT initialises it, or
            ``"gradient"``, along the residual gradient of their group on the validation batch
            (:mod:`lorank.allocators.new_ranks`).
        second_moments: where the optimiser's second moments of such ranks begin: ``"zero"``, as in a new optimiser, or
            ``"mean"``, at the mean over the module's other ranks.

    Raises:
        ScheduleError: a setting is out of its range.
    """

    why_ranks_shrink: ClassVar[str] = "The penalty prunes more ranks than needed: give a smaller l1, or a budget"

    r0: Annotated[int | None, Field(ge=1)] = None
    heads: Literal["auto", "module"] = "auto"
    head_overrides: Mapping[str, HeadGroups | None] = field(default_factory=dict)
    budget: BudgetSetting = None
    l1: Annotated[float, Field(ge=0)] = 0.01
    tv: Annotated[float, Field(ge=0)] = 0.1
    l1_term: bool = True
    alpha_lr: Annotated[float | None, Field(gt=0)] = None
    tau_start: Annotated[float, Field(gt=0)] = 0.5
    tau_end: Annotated[float, Field(gt=0)] = 0.1
    epsilon: Annotated[float, Field(gt=0, lt=0.5)] = 0.05
    resize_every: Annotated[int | None, Field(ge=1)] = None
    hold: Annotated[int | None, Field(ge=1)] = None
    min_rank: Annotated[int, Field(ge=0)] = 1
    gain: Annotated[float, Field(gt=0)] = 0.2
    reach: Annotated[float, Field(gt=0, le=1)] = 0.75
    settle: Annotated[float, Field(gt=0, le=1)] = 1.0
    new_ranks: NewRanks = "random"
    second_moments: SecondMoments = "zero"

    def __post_init__(self) -> None:
        if self.tau_end > self.tau_start:
            raise ScheduleError(f"ARDLoRA(tau_end={self.tau_end}): expected at most tau_start={self.tau_start}")
        if self._lambda_follows_budget and self.l1 == 0:
            raise ScheduleError(
                "ARDLoRA(l1=0, budget=…): lambda is adapted to the budget by multiplication, so it would stay 0. Start "
                "with a small value, e.g. l1=0.001, or set l1_term=False: then only the last resize enforces the budget"
            )

    @property
    def _lambda_follows_budget(self) -> bool:
        """Whether λ is adapted to a budget."""
        return self.budget is not None and self.l1_term

    @property
    def needs_validation_batch(self) -> bool:
        return self.new_ranks == "gradient"

    @property
    def validation_samples(self) -> int:
        return SAMPLES if self.new_ranks == "gradient" else super().validation_samples

    @property
    def own_backward(self) -> bool:
        return self.new_ranks == "gradient"

    def heads_of(self, layers: AdapterLayers) -> Mapping[str, HeadGroups]:
        return head_groups(layers, self.head_overrides) if self.heads == "auto" else {}

    def resolve_budget(self, layers: AdapterLayers, run: TrainingInfo) -> ResolvedBudget | None:
        budget = resolve_budget(self.budget, layers, run)
        needing = next((layer for layer in layers.values() if layer.min_rank), None)
        if not self.min_rank and needing is not None:
            raise ScheduleError(
                f"ARDLoRA(min_rank=0): a module with {needing.companion} needs a rank, here {needing.name}: use "
                "min_rank=1"
            )
        if budget is None:
            return None
        budget = replace(budget, minima={name: self.min_rank * size for name, size in group_sizes(layers).items()})
        if not budget.fits(budget.minima):
            used = ", ".join(
                f"{use['used']:g} of {use['limit']:g} {u}" for u, use in budget.used(budget.minima).items()
            )
            raise BudgetError(
                f"the budget cannot hold min_rank={self.min_rank} for each of the {sum(group_sizes(layers).values())} "
                f"groups ({used}): give a larger budget (the ranks of all heads count), min_rank=0 or heads='module'"
            )
        return budget

    def initial_plan(self, context: Context) -> Plan:
        layers, run = context.layers, context.run
        r0, caps = base_ranks(layers, run, self.r0), group_caps(layers)
        return plan_for_groups(layers, stored_ranks(r0, self.tau_start, self.epsilon, self.min_rank, caps))

    def due(self, step: int, run: TrainingInfo) -> bool:
        settling = self._last_resize_step(run)
        return step < run.total_steps and (step == settling or (step < settling and step % self._interval(run) == 0))

    def _interval(self, run: TrainingInfo) -> int:
        """Steps between two resizes, ≥ 1."""
        return self._steps(self.resize_every, RESIZE_EVERY, run)

    def _steps(self, given: int | None, fraction: float, run: TrainingInfo) -> int:
        """A duration in steps: as given, or else this fraction of the run, at least 1."""
        return max(1, round(fraction * run.total_steps)) if given is None else given

    def _alpha_lr(self, run: TrainingInfo) -> float:
        """η_α."""
        return ALPHA_TRAVEL / run.total_steps if self.alpha_lr is None else self.alpha_lr

    def _last_resize_step(self, run: TrainingInfo) -> int:
        """The step of the last resize, after which the ranks stay constant."""
        return max(1, round(self.settle * run.total_steps))

    def start(self, layers: AdapterLayers, run: TrainingInfo) -> State:
        r0, counts = base_ranks(layers, run, self.r0), stored_counts(layers)
        self._warn_of_slow_alpha(float(r0.max()), run)
        device = next(iter(layers.values())).A.device
        exact = torch.float32 if device.type == "mps" else torch.float64
        r0, counts, caps = r0.to(device, exact), counts.to(device), group_caps(layers).to(device)
        alpha = self._initial_alpha(r0, counts, caps)
        effective = r0 * alpha
        member, position = layout(counts)
        layers.learn_gates(masks(effective, member, position, self.tau_start))
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
            **diagnostics.start_diagnostics(rounded_ranks(effective, self.min_rank, caps), float(effective.sum())),
        }
        budget = self.resolve_budget(layers, run)
        if budget is not None:
            state |= controller.start_control(budget, group_owners(layers), r0)
        return state

    def try_out(self, context: Context, state: State) -> None:
        if context.validation_batch is not None:
            validation_loss(context.model, context.layers, context.validation_batch, context.loss_fn)
        if self.new_ranks == "gradient":
            try_directions(context)

    def _initial_alpha(self, r0: Tensor, counts: Tensor, caps: Tensor) -> Tensor:
        """α at the start, (G,): 1, or in a group that has other ranks than that stores, the α that stores them.

        A run that was interrupted leaves such groups. With α = 1, their masks would switch off trained ranks.
        """
        usual = stored_ranks(r0, self.tau_start, self.epsilon, self.min_rank, caps)
        kept = effective_of_stored(counts, self.tau_start, self.epsilon).to(r0) / r0
        return torch.where(counts == usual, torch.ones_like(r0), kept)

    def before_step(self, context: Context, state: State) -> None:
        if not context.step:
            diagnostics.record_initial_loss_(state, self._loss(context))

    @torch.no_grad()
    def after_step(self, context: Context, state: State) -> None:
        """Updates α after the optimiser step, then the masks."""
        gates, run = context.layers.gates, context.run
        assert gates is not None
        if context.step > self._last_resize_step(run):
            return
        alpha, r0, member, position = (state[key] for key in ("alpha", "r0", "member", "position"))
        # The forward pass used the masks of the previous step.
        tau = temperature(context.step - 1, run.total_steps, self.tau_start, self.tau_end)
        gradient = task_gradient(gates.grad, gates.values, r0, member, position, tau)  # (G,)
        gradient += penalty_gradient(alpha, state["before"], state["lambda"], self.tv, self.l1_term)
        state["before"] = alpha.clone()
        adam_step_(alpha, gradient, state, self._alpha_lr(run) * context.lr_factor)
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
        hold = self._steps(self.hold, HOLD, context.run)
        counts = torch.where(state["held"] >= hold, self._wanted(context, state), state["counts"])
        plan = plan_for_groups(context.layers, at_least_one(counts, state["r0"] * state["alpha"]))
        if self.new_ranks == "gradient":
            plan = with_directions(context, plan)
        loss = self._loss(context)
        effective = state["r0"] * state["alpha"]
        rounded = rounded_ranks(effective, self.min_rank, state["caps"])
        at_minimum = self._fraction_at_minimum(state, rounded)
        found = diagnostics.diagnose_(state, float(effective.sum()), at_minimum, loss)
        warned = diagnostics.warn_(
            state,
            found,
            context.step,
            strength=float(state["lambda"]),
            tv=self.tv,
            alpha_lr=self._alpha_lr(context.run),
            loss=math.nan if loss is None else loss,
        )
        if not plan and not warned:
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
        """The last resize. If the ranks are already rounded, nothing changes."""
        effective = state["r0"] * state["alpha"]
        # At most the stored ranks: a rank that was never trained is useless.
        budget = self.resolve_budget(context.layers, context.run)
        if budget is None:
            ranks = torch.minimum(rounded_ranks(effective, self.min_rank, state["caps"]), state["counts"]).cpu()
        else:
            ranks = clip_to_budget(budget, context.layers, state["counts"].cpu(), effective.cpu(), self.min_rank)
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
        """The fraction of the groups that have fallen to their minimum. 0 if the budget allows no more than that."""
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
        except ValidationBatchError:  # the batch was valid at the start, so now the loss is NaN or infinite
            loss = math.nan
        return float(context.mean(torch.tensor([loss], dtype=torch.float64)))

    def _allocation(
        self, context: Context, state: State, plan: Plan, ranks: Tensor, more: Mapping[str, Any]
    ) -> Allocation:
        """The allocation, with r0·α − i as the score of each stored rank and the ranks of every head as details."""
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
            second_moments=self.second_moments,
        )

    def _warn_of_slow_alpha(self, r0: float, run: TrainingInfo) -> None:
        reach = self._alpha_lr(run) * run.total_steps * r0
        if reach < 1:
            logger.warning(
                "ARDLoRA will not move a single rank: with alpha_lr=%g and %d steps, r0·alpha = %g can change by only "
                "about %.2g ranks, or half of that if the learning rate decays. Leave alpha_lr out, or give a higher "
                "one: by default it is %.1g in this run",
                self._alpha_lr(run),
                run.total_steps,
                r0,
                reach,
                ALPHA_TRAVEL / run.total_steps,
            )
