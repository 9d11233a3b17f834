"""Lorank gives every LoRA module the rank it earns, while training, and hands back a plain PEFT adapter."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lorank._version import __version__
from lorank.lazy import lazy_attributes

if TYPE_CHECKING:
    from lorank.allocators import (
        AdaLoRA,
        Allocation,
        Allocator,
        ALoRA,
        ALoRADNAS,
        ALoRASensi,
        ARDLoRA,
        BalancedLoRA,
        Budget,
        Context,
        RankCurve,
        ResolvedBudget,
        RoundAllocator,
        SoRA,
        StaticLoRA,
        TrainingInfo,
        gradient_start_,
        initial_ranks_,
        rank_curve,
        resize_adapter_,
    )
    from lorank.errors import BudgetError, LorankError, PlanError, ScheduleError, ValidationBatchError
    from lorank.lora import (
        AdapterLayer,
        AdapterLayers,
        LayerPlan,
        export_adapter,
        find_layers,
        plan_for_rank,
        reindex_ranks,
        reserve_,
        save_adapter,
    )
    from lorank.scoring import Scorer, Scores
    from lorank.training import RankCallback, Ranks, attach, last_checkpoint, read_history, shard_base_

# Where each public name lives. They are imported when they are first asked for: torch, transformers and PEFT take
# seconds, which `lorank --help` and a mistake in a configuration need not wait for.
_HOMES = {
    "ALoRA": "allocators",
    "ALoRADNAS": "allocators",
    "ALoRASensi": "allocators",
    "ARDLoRA": "allocators",
    "AdaLoRA": "allocators",
    "AdapterLayer": "lora",
    "AdapterLayers": "lora",
    "Allocation": "allocators",
    "Allocator": "allocators",
    "BalancedLoRA": "allocators",
    "Budget": "allocators",
    "BudgetError": "errors",
    "Context": "allocators",
    "LayerPlan": "lora",
    "LorankError": "errors",
    "PlanError": "errors",
    "RankCallback": "training",
    "RankCurve": "allocators",
    "Ranks": "training",
    "ResolvedBudget": "allocators",
    "RoundAllocator": "allocators",
    "ScheduleError": "errors",
    "Scorer": "scoring",
    "Scores": "scoring",
    "SoRA": "allocators",
    "StaticLoRA": "allocators",
    "TrainingInfo": "allocators",
    "ValidationBatchError": "errors",
    "attach": "training",
    "export_adapter": "lora",
    "find_layers": "lora",
    "gradient_start_": "allocators",
    "initial_ranks_": "allocators",
    "last_checkpoint": "training",
    "plan_for_rank": "lora",
    "rank_curve": "allocators",
    "read_history": "training",
    "reindex_ranks": "lora",
    "reserve_": "lora",
    "resize_adapter_": "allocators",
    "save_adapter": "lora",
    "shard_base_": "training",
}

__all__ = [
    "ALoRA",
    "ALoRADNAS",
    "ALoRASensi",
    "ARDLoRA",
    "AdaLoRA",
    "AdapterLayer",
    "AdapterLayers",
    "Allocation",
    "Allocator",
    "BalancedLoRA",
    "Budget",
    "BudgetError",
    "Context",
    "LayerPlan",
    "LorankError",
    "PlanError",
    "RankCallback",
    "RankCurve",
    "Ranks",
    "ResolvedBudget",
    "RoundAllocator",
    "ScheduleError",
    "Scorer",
    "Scores",
    "SoRA",
    "StaticLoRA",
    "TrainingInfo",
    "ValidationBatchError",
    "__version__",
    "attach",
    "export_adapter",
    "find_layers",
    "gradient_start_",
    "initial_ranks_",
    "last_checkpoint",
    "plan_for_rank",
    "rank_curve",
    "read_history",
    "reindex_ranks",
    "reserve_",
    "resize_adapter_",
    "save_adapter",
    "shard_base_",
]


__getattr__, __dir__ = lazy_attributes(__name__, _HOMES)
