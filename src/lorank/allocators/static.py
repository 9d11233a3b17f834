"""LoRA (Hu et al., ICLR 2022, arXiv 2106.09685): the ranks stay as they are. The baseline of every comparison."""

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
    """Plain LoRA: every module keeps one rank through the whole run.

    Args:
        budget: what the adapter may cost, see :class:`~lorank.allocators.budget.Budget`; the run starts with ranks as
            even as it allows. None: with those that the adapter was made with.

    Raises:
        BudgetError: a budget that cannot be read; at the start of a run, one that does not fit the modules.
    """

    budget: BudgetSetting = None

    moves_ranks: ClassVar[bool] = False

    def resolve_budget(self, layers: AdapterLayers, run: TrainingInfo) -> ResolvedBudget | None:
        return resolve_budget(self.budget, layers)

    def initial_plan(self, layers: AdapterLayers, run: TrainingInfo) -> Plan:
        return uniform_plan(self.budget, layers)

    def allocate(self, context: Context, state: State) -> Allocation | None:
        return None
