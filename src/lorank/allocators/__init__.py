"""The methods, one per file, and the bases of new ones: Allocator, and RoundAllocator for another score in rounds."""

from lorank.allocators.adalora import AdaLoRA
from lorank.allocators.alora import ALoRA
from lorank.allocators.alora_dnas import ALoRADNAS
from lorank.allocators.alora_sensi import ALoRASensi
from lorank.allocators.ard import ARDLoRA
from lorank.allocators.base import Allocation, Allocator, Context, State, TrainingInfo
from lorank.allocators.budget import Budget, BudgetLike
from lorank.allocators.initial_ranks import initial_ranks_
from lorank.allocators.resolved_budget import ResolvedBudget
from lorank.allocators.rounds import RoundAllocator
from lorank.allocators.sora import SoRA
from lorank.allocators.static import StaticLoRA

__all__ = [
    "ALoRA",
    "ALoRADNAS",
    "ALoRASensi",
    "ARDLoRA",
    "AdaLoRA",
    "Allocation",
    "Allocator",
    "Budget",
    "BudgetLike",
    "Context",
    "ResolvedBudget",
    "RoundAllocator",
    "SoRA",
    "State",
    "StaticLoRA",
    "TrainingInfo",
    "initial_ranks_",
]
