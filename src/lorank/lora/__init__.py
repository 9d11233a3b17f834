"""A LoRA layer physically: the only room that knows PEFT's classes and that changes a shape."""

from lorank.lora.attention_heads import head_groups
from lorank.lora.base_size import base_parameters
from lorank.lora.find_layers import find_layers
from lorank.lora.fused_forward import fuse_, is_compiled, unfuse_
from lorank.lora.gates import LearnedGates
from lorank.lora.io.load_adapter import open_adapter, read_adapter_config
from lorank.lora.io.load_weights import follow_loaded_ranks
from lorank.lora.io.save_adapter import fold_gates_, save_adapter, wrap
from lorank.lora.kernels.per_head import HeadGroups
from lorank.lora.layer import AdapterLayer, AdapterLayers
from lorank.lora.optimizer_state import check_state, regrow, unwrap
from lorank.lora.per_head_conversion import compact_, expand_, take_form_
from lorank.lora.plan import LayerPlan, Plan, plan_for_heads, plan_for_rank
from lorank.lora.pool import padded
from lorank.lora.quantised import HeldBase, hold_base
from lorank.lora.rank_index import taken
from lorank.lora.reserve import reserve_
from lorank.lora.resize import resize_

__all__ = [
    "AdapterLayer",
    "AdapterLayers",
    "HeadGroups",
    "HeldBase",
    "LayerPlan",
    "LearnedGates",
    "Plan",
    "base_parameters",
    "check_state",
    "compact_",
    "expand_",
    "find_layers",
    "fold_gates_",
    "follow_loaded_ranks",
    "fuse_",
    "head_groups",
    "hold_base",
    "is_compiled",
    "open_adapter",
    "padded",
    "plan_for_heads",
    "plan_for_rank",
    "read_adapter_config",
    "regrow",
    "reserve_",
    "resize_",
    "save_adapter",
    "take_form_",
    "taken",
    "unfuse_",
    "unwrap",
    "wrap",
]
