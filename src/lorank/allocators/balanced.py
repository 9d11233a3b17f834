"""BalancedLoRA: balanced truncation from a gradient start. Lorank's own method (docs/balanced.md).

1. **Start wide.** The run begins with k times its budget. Where ranks go, and the directions that A begins with, come
   from the gradient of the frozen weights on a few batches (gradient_start.py).
2. **Cut early.** At n steps in the first part of the run, every module is turned to its balanced basis, in which taking
   rank i away costs ½ σ_i² (scoring/balanced.py). The ranks with the largest σ_i² per trained number stay, as many as
   the budget of the moment holds:

       budget(i) = budget · (1 + (k − 1)(1 − i/n)³)        after cut i of n, as AdaLoRA's cubic schedule

   Weights and the optimiser's moments turn with the basis, so the model's output changes by what is cut, and by nothing
   else.
3. **Train on** with ranks that stay.

While the adapter is wide, the learning rate is multiplied by (budget / live ranks)^p, since a wide adapter diverges at
rates that suit a narrow one.

Why it works: the score of a single rank depends on the basis, of which there are infinitely many (B A = B M⁻¹ · M A);
near an optimum the first-order term of a score is noise, and what a rank is worth is of second order; and a rank that
comes late has few steps left. So this method chooses among directions that were all trained from the beginning.
"""

from __future__ import annotations

import logging
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from lorank.allocators.base import Allocation, Allocator, Context, State, TrainingInfo
from lorank.allocators.budget import Budget, BudgetSetting
from lorank.allocators.gradient_start import gradient_plan
from lorank.allocators.resolved_budget import ResolvedBudget
from lorank.allocators.settings import settings
from lorank.errors import ScheduleError, ValidationBatchError
from lorank.lora import AdapterLayers, LayerPlan, Plan, plan_for_rank
from lorank.scoring import BalancedScorer

logger = logging.getLogger("lorank")

WINDOW = 0.5
"""Gramians are averaged over this last part of the steps before each cut: weights still move fast before it."""


@settings(raises=ScheduleError)
class BalancedLoRA(Allocator):
    """Balanced truncation from a gradient start.

    Args:
        budget: the adapter's budget, see :class:`~lorank.allocators.budget.Budget`; None: as many trained numbers as
            the adapter was made with.
        wide: k, how wide the adapter begins, as a multiple of the budget: 4. ≥ 1. 1 never exceeds the budget.
        cuts: n, the number of cuts: 3. ≥ 1.
        until: the last cut, as a fraction of the run: 0.3. In (0, 1). The others come at equal distances before it.
        init: ``"gradient"``: ranks and directions at the start come from the gradient of a few batches of training
            data; ``"default"``: ranks are as even as possible, and A is random, as PEFT makes it.
        lr_power: p, the power of (budget / live ranks) by which the learning rate is multiplied while the adapter is
            wide: 0.5. ≥ 0; 0 leaves the rate as it is.

    Raises:
        ScheduleError: a setting is out of its range.
        BudgetError: the budget cannot be parsed; or, at the start of a run, it does not fit the modules.
    """

    sees_gradients: ClassVar[bool] = False

    budget: BudgetSetting = None
    wide: Annotated[float, Field(ge=1)] = 4.0
    cuts: Annotated[int, Field(ge=1)] = 3
    until: Annotated[float, Field(gt=0, lt=1)] = 0.3
    init: Literal["gradient", "default"] = "gradient"
    lr_power: Annotated[float, Field(ge=0)] = 0.5

    @property
    def watches_passes(self) -> bool:
        return True

    @property
    def own_backward(self) -> bool:
        return self.init == "gradient"

    @property
    def wants_train_batches(self) -> bool:
        return self.init == "gradient"

    def resolve_budget(self, layers: AdapterLayers, run: TrainingInfo) -> ResolvedBudget:
        budget = Budget(percent_of_adapter=100) if self.budget is None else Budget.parse(self.budget)
        return budget.resolve(layers, run.initial_ranks)

    def initial_plan(self, context: Context) -> Plan:
        layers = context.layers
        wide = self._wide_budget(context, 1.0)
        if self.init == "default":
            return {name: plan_for_rank(layers[name].rank, rank) for name, rank in wide.uniform().items()}
        if not context.train_batches:
            raise ValidationBatchError(
                "BalancedLoRA begins with the directions of the gradient on a few batches of training data, and none "
                "were given: use attach(…, train_batches=[batch, …]) with batches as your loop makes them, e.g. 4; or "
                'BalancedLoRA(init="default"), which begins with random directions'
            )
        return gradient_plan(context, wide)

    def start(self, layers: AdapterLayers, run: TrainingInfo) -> State:
        return self._scorer.start(layers, run)

    def try_out(self, context: Context, state: State) -> None:
        """Measures once on the validation batch, if the passes of training cannot be watched."""
        if context.layers.gramians is None:
            self._scorer.score(context, state, lambda scores: ())

    def lr_factor(self, context: Context) -> float:
        """(budget / live ranks)^p, at most 1."""
        if context.step >= self._last(context.run):
            return 1.0
        used = self.resolve_budget(context.layers, context.run).share(context.layers.ranks)
        return float(max(used, 1.0) ** -self.lr_power)

    def before_step(self, context: Context, state: State) -> None:
        if self._in_window(context.step + 1, context.run):
            self._scorer.before_step(context, state)
        elif context.layers.gramians is not None:
            context.layers.gramians.clear()

    def after_step(self, context: Context, state: State) -> None:
        if context.step > self._last(context.run):
            self._scorer.end(context, state)
        elif context.layers.gramians is not None:
            context.layers.gramians.collecting = self._in_window(context.step + 1, context.run)

    def due(self, step: int, run: TrainingInfo) -> bool:
        return step in self._schedule(run)

    def allocate(self, context: Context, state: State) -> Allocation | None:
        return self._cut(context, state, self._wide_budget(context, self._schedule(context.run)[context.step]))

    def after_resize(self, context: Context, state: State, origins: Tensor) -> None:
        self._scorer.after_resize(context, state, origins)

    def finish(self, context: Context, state: State) -> Allocation | None:
        """The last cut, if training has stopped before it."""
        budget = self.resolve_budget(context.layers, context.run)
        return None if budget.fits(context.layers.ranks) else self._cut(context, state, budget)

    @property
    def _scorer(self) -> BalancedScorer:
        return BalancedScorer()

    def _schedule(self, run: TrainingInfo) -> dict[int, float]:
        """Per step with a cut, the position of the budget between the wide one (1) and the final one (0)."""
        steps = [max(1, round(self.until * run.total_steps * i / self.cuts)) for i in range(1, self.cuts + 1)]
        return {step: (1 - i / self.cuts) ** 3 for i, step in enumerate(steps, 1)}

    def _last(self, run: TrainingInfo) -> int:
        """The step of the last cut."""
        return max(self._schedule(run))

    def _in_window(self, step: int, run: TrainingInfo) -> bool:
        """Whether the passes of this step, from 1, count for the cut that comes next."""
        before = 0
        for cut in self._schedule(run):
            if step <= cut:
                return step > cut - max(1, round(WINDOW * (cut - before)))
            before = cut
        return False

    def _wide_budget(self, context: Context, position: float) -> ResolvedBudget:
        """The budget of a moment. ``position``: 1 for the start of the run, 0 for the final budget."""
        budget = self.resolve_budget(context.layers, context.run)
        most = {name: layer.max_rank for name, layer in context.layers.items()}
        return budget.times(1 + (self.wide - 1) * position, most)

    def _cut(self, context: Context, state: State, budget: ResolvedBudget) -> Allocation | None:
        layers = context.layers
        if not float(state["steps"]) and context.validation_batch is None:  # it stops before any pass was watched
            order = {name: -torch.arange(rank).double() for name, rank in layers.ranks.items()}
            kept = budget.keep_best(order)
            logger.warning(
                "step %d: BalancedLoRA has seen no gradient of any rank since the last cut, or none that was finite, "
                "so every module keeps its first ranks. In a short run this is so at the first step",
                context.step,
            )
            return Allocation(
                {name: LayerPlan(some) for name, some in kept.items() if len(some) < layers[name].rank},
                order,
                {"gramians": "none"},
            )
        found = self._scorer.score(context, state, lambda scores: ())
        kept = budget.keep_best(budget.per_cost(found.values))
        plan = {name: LayerPlan(kept[name], basis=found.bases[name]) for name, layer in layers.items() if layer.rank}
        lost = sum(float(values.sum() - values[list(kept[name])].sum()) for name, values in found.values.items()) / 2
        total = sum(float(values.sum()) for values in found.values.values())
        details = {
            **found.details,
            "predicted_loss_increase": lost,
            "worth_kept": 1 - 2 * lost / total if total else 1.0,
            "budget": budget.used({name: len(some) for name, some in kept.items()}),
        }
        return Allocation(plan, found.values, details)
