"""ALoRA's rounds, for any scorer: train K1; then up to N_A times prune, reallocate, train K2.

The schedule is :class:`~lorank.allocators.schedule.RoundSchedule`, the reallocation is
:func:`~lorank.allocators.reallocation.prune_and_reallocate`. Each method defines its own scorer.

The defaults are the paper's form. Beside it, new ranks may begin along the residual gradient and with second moments of
their own, and scores may count per trained parameter.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator, Field
from torch import Tensor

from lorank.allocators.base import Allocation, Allocator, Context, State, TrainingInfo
from lorank.allocators.budget import BudgetSetting, resolve_budget, uniform_plan
from lorank.allocators.new_ranks import SAMPLES, NewRanks, try_directions, with_directions
from lorank.allocators.reallocation import lowest_ranks, prune_and_reallocate
from lorank.allocators.resolved_budget import ResolvedBudget
from lorank.allocators.schedule import RoundSchedule
from lorank.allocators.settings import settings
from lorank.errors import ScheduleError
from lorank.lora import AdapterLayers, Plan, SecondMoments
from lorank.scoring import Scorer

PRUNED_PER_ROUND = 1 / 8
"""The fraction of all ranks that a round prunes: at the paper's rank of 8, one per module."""


def _not_zero(rounds: object) -> object:
    if rounds == 0:
        raise ValueError("expected at least 1. For plain LoRA use StaticLoRA()")
    return rounds


@settings(raises=ScheduleError)
class RoundAllocator(Allocator):
    """Base class of the methods with rounds. A subclass adds its own settings and its scorer.

    Args:
        k1: K1, how long to train before the first round; None: 10 % of the run, or 1 epoch (the paper) where ``unit``
            is ``"epochs"``. > 0, and below 1 as a fraction of the run.
        k2: K2, how long to train between rounds; None: 5.7 % of the run, so that eight rounds end in its middle, or
            0.25 epoch (the paper) where ``unit`` is ``"epochs"``. > 0, and below 1 as a fraction of the run.
        rounds: N_A, the highest number of rounds: 8. ≥ 1. A round at the run's last step or later is left out, because
            new ranks need training.
        unit: what ``k1`` and ``k2`` count: ``"run"``, the fraction of the run (0.1 is a tenth of it), ``"epochs"`` or
            optimiser ``"steps"``.
        per_round: n_A, ranks pruned and given in each round, over all modules; None: an eighth of the ranks of the
            adapter or the budget, at least 1. At the paper's rank of 8 that is one per module, as in the paper. ≥ 1.
        retry_empty: whether a module at rank 0 may receive ranks again. It then counts as a module that lost none, less
            important than all modules with a score.
        budget: the adapter's budget at any time, see :class:`~lorank.allocators.budget.Budget`; None: the number of
            ranks that the adapter was made with.
        new_ranks: how A begins at new ranks: ``"random"``, as PEFT initialises it (the paper), or ``"gradient"``, along
            the residual gradient on the validation batch (:mod:`lorank.allocators.new_ranks`).
        second_moments: where the optimiser's second moments of new ranks begin: ``"zero"``, as in a new optimiser, or
            ``"mean"``, at the mean over the module's other ranks. With zero, Adam's first updates of a new rank are
            several times the learning rate.
        per_parameter: whether scores are divided by d_in + d_out, what a rank trains, before ranks and modules are
            compared. It needs scores that are 0 for a rank that adds nothing.

    Raises:
        ScheduleError: a setting is out of its range.
        BudgetError: the budget cannot be parsed; or, at the start of a run, it does not fit the modules.
    """

    why_ranks_shrink: ClassVar[str] = (
        "In a round in which every module loses a rank, no module receives any: give a smaller per_round"
    )

    k1: Annotated[float | None, Field(gt=0)] = None
    k2: Annotated[float | None, Field(gt=0)] = None
    rounds: Annotated[int, Field(ge=1), BeforeValidator(_not_zero)] = 8
    unit: Literal["run", "epochs", "steps"] = "run"
    per_round: Annotated[int | None, Field(ge=1)] = None
    retry_empty: bool = False
    budget: BudgetSetting = None
    new_ranks: NewRanks = "random"
    second_moments: SecondMoments = "zero"
    per_parameter: bool = False

    def __post_init__(self) -> None:
        for name, value in (("k1", self.k1), ("k2", self.k2)):
            if self.unit == "run" and value is not None and value >= 1:
                raise ScheduleError(
                    f"{type(self).__name__}({name}={value:g}): expected a fraction of the run, below 1. For epochs or "
                    f"optimiser steps give the unit too: {name}={value:g}, unit='epochs' or unit='steps'"
                )

    @property
    @abstractmethod
    def scorer(self) -> Scorer:
        """The scorer of the method."""

    @property
    def needs_validation_batch(self) -> bool:
        return self.scorer.needs_validation_batch or self.new_ranks == "gradient"

    @property
    def validation_samples(self) -> int:
        own = self.scorer.validation_samples
        return max(own, SAMPLES) if self.new_ranks == "gradient" else own

    @property
    def sees_gradients(self) -> bool:
        return self.scorer.sees_gradients

    @property
    def own_backward(self) -> bool:
        return self.scorer.own_backward or self.new_ranks == "gradient"

    @property
    def watches_passes(self) -> bool:
        return self.scorer.watches_passes

    def due(self, step: int, run: TrainingInfo) -> bool:
        return self._schedule.due(step, run)

    def resolve_budget(self, layers: AdapterLayers, run: TrainingInfo) -> ResolvedBudget | None:
        return resolve_budget(self.budget, layers, run)

    def initial_plan(self, context: Context) -> Plan:
        return uniform_plan(self.budget, context.layers, context.run)

    def start(self, layers: AdapterLayers, run: TrainingInfo) -> State:
        self._check_that_ranks_stay(layers, run)
        return self.scorer.start(layers, run)

    def try_out(self, context: Context, state: State) -> None:
        self.scorer.try_out(context, state)
        if self.new_ranks == "gradient":
            try_directions(context)

    def before_step(self, context: Context, state: State) -> None:
        if context.step < self._schedule.last(context.run):
            self.scorer.before_step(context, state)

    def after_step(self, context: Context, state: State) -> None:
        if context.step <= self._schedule.last(context.run):
            self.scorer.after_step(context, state)
        else:
            self.scorer.end(context, state)

    def allocate(self, context: Context, state: State) -> Allocation | None:
        layers = context.layers
        count, minima = self._to_prune(layers, context.run), _minima(layers)
        found = self.scorer.score(
            context, state, lambda scores: lowest_ranks(self._comparable(scores, layers), count, minima)
        )
        scores = self._comparable(found.values, layers)
        budget = self.resolve_budget(layers, context.run)
        plan = prune_and_reallocate(
            scores,
            count,
            {name: layer.max_rank for name, layer in layers.items()},
            self.retry_empty,
            budget=budget,
            minima=minima,
            bases=found.bases,
        )
        if self.new_ranks == "gradient":
            plan = with_directions(context, plan)
        details = dict(found.details)
        if budget is not None:
            after = {name: plan[name].rank if name in plan else layer.rank for name, layer in layers.items()}
            details["budget"] = budget.used(after)
        return Allocation(plan, scores, details, second_moments=self.second_moments)

    def _comparable(self, scores: Mapping[str, Tensor], layers: AdapterLayers) -> Mapping[str, Tensor]:
        """The scores by which ranks are compared, (r,) per module."""
        if not self.per_parameter:
            return scores
        return {name: values / layers[name].rank_parameters for name, values in scores.items()}

    def after_resize(self, context: Context, state: State, origins: Tensor) -> None:
        self.scorer.after_resize(context, state, origins)
        if context.step >= self._schedule.last(context.run):
            self.scorer.end(context, state)

    @property
    def _schedule(self) -> RoundSchedule:
        return RoundSchedule(self.k1, self.k2, self.rounds, self.unit)

    def _check_that_ranks_stay(self, layers: AdapterLayers, run: TrainingInfo) -> None:
        """Raises ScheduleError if one round would leave fewer ranks than the minimum."""
        pruned = self._count(layers, run)
        plan = uniform_plan(self.budget, layers, run)
        total = sum(plan[name].rank if name in plan else layer.rank for name, layer in layers.items())
        needed = _needed(layers)
        if pruned > total - needed:
            raise ScheduleError(
                f"{type(self).__name__} would prune n_A = {pruned} ranks in a round, but the {len(layers)} modules "
                f"have {total} in all, of which {needed} must stay: raise the rank in LoraConfig(r=…) or the budget, "
                "or give a smaller per_round"
            )

    def _count(self, layers: AdapterLayers, run: TrainingInfo) -> int:
        """n_A, the same in every round of a run."""
        if self.per_round is not None:
            return self.per_round
        budget = self.resolve_budget(layers, run)
        ranks = run.initial_ranks or layers.ranks
        if budget is not None and not budget.is_used_up_by(ranks):
            ranks = budget.uniform()
        return max(1, round(sum(ranks.values()) * PRUNED_PER_ROUND))

    def _to_prune(self, layers: AdapterLayers, run: TrainingInfo) -> int:
        """n_A, or fewer if otherwise fewer ranks than the minimum would remain, because the total has shrunk."""
        return max(0, min(self._count(layers, run), layers.total_rank - _needed(layers)))


def _needed(layers: AdapterLayers) -> int:
    """The lowest allowed total rank of all modules: at least one, because an adapter cannot be empty."""
    return max(1, sum(_minima(layers).values()))


def _minima(layers: AdapterLayers) -> dict[str, int]:
    return {name: layer.min_rank for name, layer in layers.items()}
