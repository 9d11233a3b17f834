"""ALoRA's rounds: when ranks move, and how many. What a rank is worth is each method's own.

train K1; then up to N_A times: prune the n_A ranks with the lowest scores, give n_A new ranks to the modules that
lost none this round, train K2
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lorank.allocators.base import Allocation, TrainingInfo, epochs_to_steps
from lorank.allocators.budget import BudgetLike, resolve_budget, uniform_plan
from lorank.allocators.resolved_budget import ResolvedBudget
from lorank.errors import ScheduleError
from lorank.lora import AdapterLayers, LayerPlan, Plan

PAPER_EPOCHS = 10.0


@dataclass(frozen=True)
class Rounds:
    """The settings that all methods with rounds share, and what follows from them.

    Args:
        method: its name, for messages.
        k1, k2, rounds, unit, per_round, retry_empty, budget: see :class:`~lorank.allocators.alora.ALoRA`.
    """

    method: str
    k1: float
    k2: float
    rounds: int
    unit: str
    per_round: int | None
    retry_empty: bool
    budget: BudgetLike

    @classmethod
    def of(cls, settings: Any) -> Rounds:
        """Those of a method that has them as fields of its own."""
        return cls(
            type(settings).__name__,
            settings.k1,
            settings.k2,
            settings.rounds,
            settings.unit,
            settings.per_round,
            settings.retry_empty,
            settings.budget,
        )

    def check(self) -> None:
        """Raises ScheduleError for a setting out of its range."""
        check_choice(self.method, "unit", self.unit, ("epochs", "steps"))
        if not (self.k1 > 0 and self.k2 > 0):
            raise ScheduleError(f"{self.method}(k1={self.k1}, k2={self.k2}): both must be above 0 {self.unit}")
        if self.rounds < 1:
            raise ScheduleError(
                f"{self.method}(rounds={self.rounds}): expected at least 1. For plain LoRA use StaticLoRA()"
            )
        if self.per_round is not None and self.per_round < 1:
            raise ScheduleError(
                f"{self.method}(per_round={self.per_round}): expected at least 1, or None for one per module"
            )

    def check_run(self, layers: AdapterLayers, run: TrainingInfo) -> None:
        """Raises ScheduleError if one round would leave less than must stay."""
        pruned = self._count(layers)
        plan = self.initial_plan(layers)
        total = sum(plan[name].rank if name in plan else layer.rank for name, layer in layers.items())
        needed = _needed(layers)
        if pruned > total - needed:
            raise ScheduleError(
                f"{self.method} would prune n_A = {pruned} ranks in a round and the {len(layers)} modules have {total} "
                f"in all, of which {needed} must stay: raise the rank in LoraConfig(r=…) or the budget, or name a "
                "smaller per_round"
            )

    def resolve_budget(self, layers: AdapterLayers) -> ResolvedBudget | None:
        return resolve_budget(self.budget, layers)

    def initial_plan(self, layers: AdapterLayers) -> Plan:
        return uniform_plan(self.budget, layers)

    def due(self, step: int, run: TrainingInfo) -> bool:
        first, every = self._first_and_every(run)
        done, since = divmod(step - first, every)
        return since == 0 and 0 <= done < self.rounds and step < run.total_steps

    def last(self, run: TrainingInfo) -> int:
        """The step of the last round; 0 where there is none."""
        first, every = self._first_and_every(run)
        if first >= run.total_steps:
            return 0
        return first + every * min(self.rounds - 1, (run.total_steps - 1 - first) // every)

    def lowest(self, layers: AdapterLayers, scores: Mapping[str, Tensor]) -> list[tuple[str, int]]:
        """The ranks that one round prunes, (module, index), from the lowest score upwards."""
        return _lowest(scores, self._to_prune(layers), _minima(layers))

    def allocation(self, layers: AdapterLayers, scores: Mapping[str, Tensor], details: Mapping[str, Any]) -> Allocation:
        """One round.

        Args:
            scores: per layer (r,), higher = keep.
            details: of the scores, for the history; what the budget then is comes with them.
        """
        limits = self.resolve_budget(layers)
        plan = prune_and_reallocate(
            scores,
            self._to_prune(layers),
            {name: layer.max_rank for name, layer in layers.items()},
            self.retry_empty,
            limits=limits,
            minima=_minima(layers),
        )
        if limits is not None:
            after = {name: plan[name].rank if name in plan else layer.rank for name, layer in layers.items()}
            details = {**details, "budget": limits.used(after)}
        return Allocation(plan, scores, details)

    def _count(self, layers: AdapterLayers) -> int:
        return len(layers) if self.per_round is None else self.per_round

    def _to_prune(self, layers: AdapterLayers) -> int:
        """n_A, or fewer where rounds have shrunk the total so far that less than must stay would be left."""
        return max(0, min(self._count(layers), layers.total_rank - _needed(layers)))

    def _first_and_every(self, run: TrainingInfo) -> tuple[int, int]:
        if self.unit == "steps":
            return max(1, round(self.k1)), max(1, round(self.k2))
        return epochs_to_steps(self.k1, run, PAPER_EPOCHS), epochs_to_steps(self.k2, run, PAPER_EPOCHS)


def check_choice(method: str, name: str, value: str, allowed: Sequence[str]) -> None:
    """Raises ScheduleError if a setting is none of its choices."""
    if value not in allowed:
        raise ScheduleError(f"{method}({name}={value!r}): expected one of {', '.join(allowed)}")


def prune_and_reallocate(
    scores: Mapping[str, Tensor],
    count: int,
    capacity: Mapping[str, int],
    retry_empty: bool = False,
    *,
    limits: ResolvedBudget | None = None,
    minima: Mapping[str, int] | None = None,
) -> Plan:
    """One round: prune the ``count`` lowest ranks, give as many to the modules that lost none.

    Args:
        scores: per module (r,), higher = keep; (0,) for a module at rank 0.
        count: n_A, fewer than there are ranks.
        capacity: per module, the most ranks that it can hold.
        retry_empty: whether modules at rank 0 may receive.
        limits: a budget; gifts then go on while it has room for one more, instead of ``count`` of them.
        minima: per module, the ranks that it cannot do without; default: none.

    Returns:
        A plan that names every module that changes.
    """
    names = list(scores)
    kept = {name: set(range(len(scores[name]))) for name in names}
    for name, rank in _lowest(scores, count, minima or {}):
        kept[name].discard(rank)
    lost = {name for name in names if len(kept[name]) < len(scores[name])}
    # Modules by importance: the mean score, ties by order (sorted is stable); empty ones, if allowed, come last.
    unhurt = [name for name in names if name not in lost]
    receivers = sorted((n for n in unhurt if len(scores[n])), key=lambda n: -float(scores[n].double().mean()))
    if retry_empty:
        receivers += [name for name in unhurt if not len(scores[name])]
    gifts = _deal({name: len(ranks) for name, ranks in kept.items()}, receivers, capacity, count, limits)
    return {
        name: LayerPlan(tuple(sorted(kept[name])), gifts.get(name, 0))
        for name in names
        if name in lost or gifts.get(name, 0)
    }


def _lowest(scores: Mapping[str, Tensor], count: int, minima: Mapping[str, int]) -> list[tuple[str, int]]:
    """The ``count`` lowest ranks over all modules, ties by module order, then rank order; minima are left alone."""
    owners = [(name, rank) for name, values in scores.items() for rank in range(len(values))]
    flat = torch.cat([values.double().cpu() for values in scores.values()])  # (R,)
    spare = {name: len(values) - minima.get(name, 0) for name, values in scores.items()}
    lowest: list[tuple[str, int]] = []
    for name, rank in (owners[i] for i in torch.sort(flat, stable=True).indices.tolist()):
        if len(lowest) == count:
            break
        if spare[name] > 0:
            spare[name] -= 1
            lowest.append((name, rank))
    return lowest


def _deal(
    ranks: Mapping[str, int],
    receivers: Sequence[str],
    capacity: Mapping[str, int],
    count: int,
    limits: ResolvedBudget | None,
) -> dict[str, int]:
    """Deals ranks in turns, in the order of ``receivers``: as even as can be, the remainder to the first.

    Without limits ``count`` of them, with limits as many as they have room for. Full modules sit out.
    """
    held = dict(ranks)
    dealt, turn = 0, list(receivers)
    while turn:
        still = []
        for name in turn:
            if (limits is None and dealt == count) or held[name] >= capacity[name]:
                continue
            if limits is not None and not limits.room(held, name):
                continue
            held[name] += 1
            dealt += 1
            still.append(name)
        turn = still
    return {name: held[name] - ranks[name] for name in receivers}


def _needed(layers: AdapterLayers) -> int:
    """The ranks that must stay, over all modules: an adapter without any is none."""
    return max(1, sum(_minima(layers).values()))


def _minima(layers: AdapterLayers) -> dict[str, int]:
    return {name: getattr(layer, "min_rank", 0) for name, layer in layers.items()}
