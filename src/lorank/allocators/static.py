"""LoRA (Hu et al., ICLR 2022, arXiv 2106.09685) with constant ranks. It is the baseline of every comparison."""

from __future__ import annotations

from typing import ClassVar

from lorank.allocators.base import Allocation, Allocator, Context, State, TrainingInfo
from lorank.allocators.budget import BudgetSetting, resolve_budget, uniform_plan
from lorank.allocators.resolved_budget import ResolvedBudget
from lorank.allocators.settings import settings
from lorank.errors import ScheduleError
from lorank.lora import AdapterLayers, Plan


@settings(raises=ScheduleError)
class StaticLoRA(Allocator):
    """Plain LoRA: the rank of every module stays constant during the run.

    Args:
        budget: the adapter's budget, see :class:`~lorank.allocators.budget.Budget`; the run starts with ranks as even
            as possible. None: the ranks that the adapter was made with.

    Raises:
        BudgetError: the budget cannot be parsed; or, at the start of a run, it does not fit the modules.
    """

    budget: BudgetSetting = None

    moves_ranks: ClassVar[bool] = False

    def resolve_budget(self, layers: AdapterLayers, run: TrainingInfo) -> ResolvedBudget | None:
        return resolve_budget(self.budget, layers, run)

    def initial_plan(self, context: Context) -> Plan:
        return uniform_plan(self.budget, context.layers, context.run)

    def allocate(self, context: Context, state: State) -> Allocation | None:
        return None
