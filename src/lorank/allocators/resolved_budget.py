"""A budget resolved for a model: the cost of one more rank in each module, and the limit on the total cost.

All functions here are pure functions of ranks (or scores) by module name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lorank.errors import BudgetError

_UNITS = {
    "ranks_per_module": "ranks per module",
    "percent": "per cent of the base model",
    "percent_of_adapter": "per cent of the adapter as it was made",
}
"""Units as text, where the name of the field is not the text."""


@dataclass(frozen=True)
class Constraint:
    """Σ_m costs[m] · r_m ≤ limit.

    Args:
        unit: the field of the budget that the constraint belongs to.
        costs: per module, the cost of one rank, ≥ 1.
        limit: the highest total cost of all ranks.
        unit_size: the cost of one unit that the user thinks in (one rank per module, one per cent of the base model).
        named: the limit as the user named it, in this unit. ``limit`` is a whole number, so it may be a little less.
            None: it was not named.
    """

    unit: str
    costs: Mapping[str, int]
    limit: int
    unit_size: float = 1.0
    named: float | None = None

    @property
    def text(self) -> str:
        """The limit as text, as the user named it; a part of something also in parameters."""
        if self.named is None:
            return self.amount(self.limit)
        whole = f" ({self.limit:,} parameters)" if self.unit.startswith("percent") else ""
        return f"{self.named:.6g} {_UNITS.get(self.unit, self.unit)}{whole}"

    def cost(self, ranks: Mapping[str, int]) -> int:
        return sum(self.costs[name] * rank for name, rank in ranks.items())

    def amount(self, cost: int) -> str:
        """A cost in the unit that the user thinks in, as text: ``0.32 per cent of the base model``."""
        return f"{cost / self.unit_size:.6g} {_UNITS.get(self.unit, self.unit)}"


@dataclass(frozen=True)
class ResolvedBudget:
    """All constraints of a budget, for one model.

    Args:
        constraints: the constraints; all of them must hold.
        caps: per module, in the model's order, the highest allowed rank.
        minima: per module, the lowest allowed rank: 0, or 1 if the module trains something beside its LoRA
            (:attr:`lorank.lora.AdapterLayer.min_rank`).
    """

    constraints: tuple[Constraint, ...]
    caps: Mapping[str, int]
    minima: Mapping[str, int]

    def fits(self, ranks: Mapping[str, int]) -> bool:
        """Whether ``ranks`` (by module) are within every constraint and cap."""
        return all(rank <= self.caps[name] for name, rank in ranks.items()) and all(
            constraint.cost(ranks) <= constraint.limit for constraint in self.constraints
        )

    def used(self, ranks: Mapping[str, int]) -> dict[str, dict[str, float]]:
        """Per unit of the budget, the amount that ``ranks`` use and the limit. JSON-serialisable."""
        return {c.unit: {"used": c.cost(ranks) / c.unit_size, "limit": c.limit / c.unit_size} for c in self.constraints}

    def describe(self) -> str:
        """The limits as text: ``84 ranks and 0.32 per cent of the base model (10,310 parameters)``."""
        return " and ".join(constraint.text for constraint in self.constraints)

    def room(self, ranks: Mapping[str, int], name: str) -> int:
        """How many more ranks module ``name`` may receive if all other modules keep their ranks. ≥ 0."""
        spare = [(c.limit - c.cost(ranks)) // c.costs[name] for c in self.constraints]
        return max(0, min([self.caps[name] - ranks[name], *spare]))

    def is_used_up_by(self, ranks: Mapping[str, int]) -> bool:
        """Whether ``ranks`` fit the budget and no module can receive one more rank."""
        return self.fits(ranks) and not any(self.room(ranks, name) for name in self.caps)

    def uniform(self) -> dict[str, int]:
        """Ranks by module, as even as possible.

        All modules get the highest rank that fits the budget, limited by their caps. Then each module, in order,
        receives one more rank if it fits. Any two modules below their caps differ by at most 1.
        """
        low, high = 0, max(self.caps.values())
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.fits(self._level(middle)) else (low, middle - 1)
        ranks = self._level(low)
        for name, rank in list(ranks.items()):
            if rank == low and self.room(ranks, name):
                ranks[name] += 1
        return ranks

    def keep_best(self, scores: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
        """The ranks with the highest scores that fit the budget, chosen greedily from the highest score.

        If a rank does not fit, a rank with a lower score in a cheaper module may still fit. Every module first keeps
        its best ranks up to its minimum. Exact ties are broken by module order, then rank order.

        Args:
            scores: per module (r,), higher = keep.

        Returns:
            Per module, the indices of the ranks to keep, ascending.

        Raises:
            BudgetError: a score is NaN.
        """
        owners = [(name, rank) for name, values in scores.items() for rank in range(len(values))]
        flat = torch.cat([values.detach().double().cpu() for values in scores.values()])  # (R,)
        if flat.isnan().any():
            name, rank = owners[int(flat.isnan().nonzero()[0])]
            raise BudgetError(
                f"the score of rank {rank} of {name} is NaN, so ranks cannot be ordered. Check that the weights and "
                "the gradients are finite (training may have diverged)"
            )
        best_first = [owners[i] for i in torch.sort(flat, descending=True, stable=True).indices.tolist()]
        kept: dict[str, list[int]] = {name: [] for name in scores}
        needed = []
        for name, rank in best_first:
            if len(kept[name]) < self.minima.get(name, 0):
                kept[name].append(rank)
                needed.append((name, rank))
        ranks = {name: len(some) for name, some in kept.items()}
        spare = [c.limit - c.cost(ranks) for c in self.constraints]
        costs = {name: [c.costs[name] for c in self.constraints] for name in scores}
        taken = set(needed)
        for name, rank in best_first:
            if (name, rank) in taken or len(kept[name]) >= self.caps[name]:
                continue
            if all(cost <= left for cost, left in zip(costs[name], spare, strict=True)):
                kept[name].append(rank)
                spare = [left - cost for cost, left in zip(costs[name], spare, strict=True)]
        return {name: tuple(sorted(some)) for name, some in kept.items()}

    def times(self, factor: float, most: Mapping[str, int]) -> ResolvedBudget:
        """``factor`` times this budget, but no more than modules can hold.

        Args:
            factor: ≥ 1. Limits and caps are multiplied by it.
            most: per module, the highest rank that it can hold.
        """
        return replace(
            self,
            constraints=tuple(replace(c, limit=int(c.limit * factor), named=None) for c in self.constraints),
            caps={name: max(cap, min(most[name], int(cap * factor))) for name, cap in self.caps.items()},
        )

    def share(self, ranks: Mapping[str, int]) -> float:
        """The cost of ``ranks`` as a multiple of the limit; the highest over all constraints."""
        return max(c.cost(ranks) / c.limit for c in self.constraints)

    def per_cost(self, scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Scores divided by what a rank costs in its module, in the unit of the first constraint.

        Args:
            scores: per module (r,).
        """
        costs = self.constraints[0].costs
        return {name: values / costs[name] for name, values in scores.items()}

    def relaxed(self, start_ranks: Mapping[str, int], fraction: float) -> ResolvedBudget:
        """A budget between ``start_ranks`` and this one: each limit L becomes ⌊L + (cost(start) − L) · fraction⌋.

        Caps change in the same way. A limit or cap that ``start_ranks`` do not exceed stays unchanged.

        Args:
            start_ranks: ranks that are allowed at ``fraction`` 1.
            fraction: from 1 (the start) to 0 (this budget).

        Raises:
            BudgetError: ``fraction`` is below 0 or above 1.
        """
        if not 0 <= fraction <= 1:
            raise BudgetError(f"fraction={fraction}: expected 0 (the budget itself) to 1 (the ranks at the start)")

        def between(limit: int, start: int) -> int:
            return max(limit, int((start - limit) * fraction + limit))

        return replace(
            self,
            constraints=tuple(
                replace(c, limit=between(c.limit, c.cost(start_ranks)), named=None) for c in self.constraints
            ),
            caps={name: between(cap, start_ranks[name]) for name, cap in self.caps.items()},
        )

    def _level(self, rank: int) -> dict[str, int]:
        return {name: max(self.minima[name], min(rank, cap)) for name, cap in self.caps.items()}
