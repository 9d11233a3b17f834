"""The methods of rank allocation, one per file, and the parts of a new method: Allocator, RoundAllocator, …"""

from lorank.allocators.adalora import AdaLoRA
from lorank.allocators.alora import ALoRA
from lorank.allocators.alora_dnas import ALoRADNAS
from lorank.allocators.alora_sensi import ALoRASensi
from lorank.allocators.ard import ARDLoRA
from lorank.allocators.balanced import BalancedLoRA
from lorank.allocators.base import Allocation, Allocator, Context, State, TrainingInfo
from lorank.allocators.budget import Budget, BudgetLike, BudgetSetting, as_budget, resolve_budget, uniform_plan
from lorank.allocators.gate_adam import adam_step_, resize_adam_, start_adam
from lorank.allocators.gradient_start import START_BATCHES, gradient_start_
from lorank.allocators.initial_ranks import initial_ranks_
from lorank.allocators.pruning_budget import final_budget, plan_to_keep, warn_if_nothing_to_prune
from lorank.allocators.registry import Registry, find_allocators
from lorank.allocators.resolved_budget import Constraint, ResolvedBudget
from lorank.allocators.rounds import RoundAllocator
from lorank.allocators.settings import settings
from lorank.allocators.sora import SoRA
from lorank.allocators.static import StaticLoRA

__all__ = [
    "START_BATCHES",
    "ALoRA",
    "ALoRADNAS",
    "ALoRASensi",
    "ARDLoRA",
    "AdaLoRA",
    "Allocation",
    "Allocator",
    "BalancedLoRA",
    "Budget",
    "BudgetLike",
    "BudgetSetting",
    "Constraint",
    "Context",
    "Registry",
    "ResolvedBudget",
    "RoundAllocator",
    "SoRA",
    "State",
    "StaticLoRA",
    "TrainingInfo",
    "adam_step_",
    "as_budget",
    "final_budget",
    "find_allocators",
    "gradient_start_",
    "initial_ranks_",
    "plan_to_keep",
    "resize_adam_",
    "resolve_budget",
    "settings",
    "start_adam",
    "uniform_plan",
    "warn_if_nothing_to_prune",
]
