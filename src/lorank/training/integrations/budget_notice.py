"""Logs what the budget does to the adapter's size: one line at the start, and a warning if the size changes much."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from lorank.allocators import ResolvedBudget
from lorank.training.integrations.base import Integration
from lorank.training.parallel.process_group import is_first_process
from lorank.training.run_state import RunState

logger = logging.getLogger("lorank")

TOLERANCE = 0.1
"""The relative change of an adapter's size that deserves a warning."""

SHOWN_STEPS = 4
"""The number of steps of the schedule that the first line names."""


class BudgetNotice(Integration):
    """Compares the adapter's size with the adapter that the user made, and with the budget.

    - The first line gives ranks and trained parameters as made and at the start, the budget, and when ranks move. It is
      a warning if the adapter grows by more than a tenth to stay so, because a budget may be larger than the adapter.
    - While training, one warning if the parameters grow by more than a tenth. A budget in ranks allows it, because a
      rank costs more parameters in one module than in another.
    - While training, one warning if the size falls more than a tenth below the budget (without a budget: below the size
      that the adapter was made with). Unused budget costs quality.
    """

    def on_start(self, run: RunState) -> None:
        self._started = self._grown = self._shrunk = False
        self._name = type(run.allocator).__name__

    def after_allocation(self, run: RunState) -> None:
        if not is_first_process():
            return  # all processes have the same ranks
        if not self._started:
            self._started = True
            self._parameters, self._ranks = run.layers.parameters, run.layers.ranks
            self._announce(run)
        elif run.allocator.moves_ranks:
            self._warn_of_growth(run)
            self._warn_of_shrinkage(run)

    def _announce(self, run: RunState) -> None:
        layers, made = run.layers, run.info.initial_ranks
        parameters_made = sum(made[name] * (layer.d_in + layer.d_out) for name, layer in layers.items())
        text = (
            f"{self._name}: {_change(sum(made.values()), layers.total_rank)} ranks, "
            f"{_change(parameters_made, self._parameters)} trained parameters in {len(layers)} modules"
            f"{_limits(run.budget)}{_schedule(run)}"
        )
        grows = self._parameters > parameters_made * (1 + TOLERANCE)
        if grows and run.budget is not None and run.budget.share(made) >= 1 / (1 + TOLERANCE):
            text += "; the wide beginning is pruned down to the budget"
            grows = False
        if run.step or not grows:
            logger.info("%s", text)
            return
        logger.warning(
            "%s. The run trains %.3g times the parameters of the adapter that you made. Compare it with plain LoRA of "
            "as many parameters, or name a smaller budget",
            text,
            self._parameters / parameters_made,
        )

    def _warn_of_growth(self, run: RunState) -> None:
        now = run.layers.parameters
        if self._grown or now <= self._parameters * (1 + TOLERANCE):
            return
        self._grown = True
        logger.warning(
            "%s, step %d: the adapter trains %s parameters, %.0f %% more than the %s at the start. A rank costs more "
            "parameters in one module than in another. Compare this run with plain LoRA of as many parameters, or "
            "limit the parameters: budget={'parameters': %d}",
            self._name,
            run.step,
            f"{now:,}",
            100 * (now / self._parameters - 1),
            f"{self._parameters:,}",
            self._parameters,
        )

    def _warn_of_shrinkage(self, run: RunState) -> None:
        used = _used(run.budget, self._ranks, run.info.initial_ranks, run.layers.ranks)
        if self._shrunk or used >= 1 - TOLERANCE:
            return
        self._shrunk = True
        logger.warning(
            "%s, step %d: the adapter has shrunk to %d ranks and %s parameters, %.0f %% of what %s allows. %s",
            self._name,
            run.step,
            run.layers.total_rank,
            f"{run.layers.parameters:,}",
            100 * used,
            "the size that it was made with" if run.budget is None else "its budget",
            run.allocator.why_ranks_shrink,
        )


def _used(
    budget: ResolvedBudget | None, start: Mapping[str, int], made: Mapping[str, int], now: Mapping[str, int]
) -> float:
    """The part of the budget that the ranks ``now`` use, or of the ranks at the ``start`` if these use less of it.

    With several limits, the one of which most is used. Without a budget, the part of the ranks that the adapter was
    ``made`` with: a method may store more at the start than count in the end (ARD-LoRA).
    """
    if budget is None:
        return sum(now.values()) / max(1, min(sum(made.values()), sum(start.values())))
    return max(c.cost(now) / max(1, min(c.limit, c.cost(start))) for c in budget.constraints)


def _change(before: int, after: int) -> str:
    return f"{before:,}" if before == after else f"{before:,} → {after:,}"


def _limits(budget: ResolvedBudget | None) -> str:
    return "" if budget is None else f"; budget: {budget.describe()}"


def _schedule(run: RunState) -> str:
    steps = [step for step in run.allocator.schedule(run.info) if step > run.step]
    if not steps:
        return ""
    shown = ", ".join(str(step) for step in steps[:SHOWN_STEPS])
    more = f", … ({len(steps)} times)" if len(steps) > SHOWN_STEPS else ""
    return f"; ranks move after step {shown}{more}"
