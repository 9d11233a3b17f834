"""LoRA layers and their tensors. Only this folder imports PEFT, and only this folder changes the shape of a weight."""

from lorank.lora.attention_heads import head_groups
from lorank.lora.base_size import base_parameters
from lorank.lora.basis import Basis
from lorank.lora.export.export import export_adapter
from lorank.lora.find_layers import find_layers
from lorank.lora.fused_forward import fuse_, is_compiled, unfuse_
from lorank.lora.gate_compensation import compensate_gates_
from lorank.lora.gates import LearnedGates
from lorank.lora.gramians import Gramians
from lorank.lora.initialisation import check_base_unchanged, check_file_can_shrink
from lorank.lora.io.adapter_folder import is_adapter_file
from lorank.lora.io.load_adapter import load_adapter, read_adapter_config
from lorank.lora.io.load_weights import ResizeOnLoadHandle, remove_stated_ranks_, resize_on_load
from lorank.lora.io.model_card import write_card
from lorank.lora.io.save_adapter import check_save_directory, fold_gates_, save_adapter
from lorank.lora.io.standalone import StandaloneAdapter, open_standalone, save_standalone
from lorank.lora.kernels.per_head import HeadGroups
from lorank.lora.layer import AdapterLayer, AdapterLayers
from lorank.lora.optimizer_rules import check_optimizer, check_zero_rule, copies_weights
from lorank.lora.optimizer_state import SecondMoments, check_state, unwrap_optimizer
from lorank.lora.optimizer_trial import try_optimizer
from lorank.lora.peft_objects import make_lora_plus_optimizer, make_peft_model
from lorank.lora.per_head_conversion import merge_heads_, restore_layout_, split_again_, split_into_heads_
from lorank.lora.pool import padded
from lorank.lora.quantised import RepackingPrevention, prevent_repacking
from lorank.lora.rank_index import rank_origins, reindex_ranks
from lorank.lora.reserve import reserve_
from lorank.lora.resize import resize_
from lorank.lora.resize_plan import LayerPlan, NewVectors, Plan, plan_for_heads, plan_for_rank
from lorank.lora.snapshot import LayersSnapshot

__all__ = [
    "AdapterLayer",
    "AdapterLayers",
    "Basis",
    "Gramians",
    "HeadGroups",
    "LayerPlan",
    "LayersSnapshot",
    "LearnedGates",
    "NewVectors",
    "Plan",
    "RepackingPrevention",
    "ResizeOnLoadHandle",
    "SecondMoments",
    "StandaloneAdapter",
    "base_parameters",
    "check_base_unchanged",
    "check_file_can_shrink",
    "check_optimizer",
    "check_save_directory",
    "check_state",
    "check_zero_rule",
    "compensate_gates_",
    "copies_weights",
    "export_adapter",
    "find_layers",
    "fold_gates_",
    "fuse_",
    "head_groups",
    "is_adapter_file",
    "is_compiled",
    "load_adapter",
    "make_lora_plus_optimizer",
    "make_peft_model",
    "merge_heads_",
    "open_standalone",
    "padded",
    "plan_for_heads",
    "plan_for_rank",
    "prevent_repacking",
    "rank_origins",
    "read_adapter_config",
    "reindex_ranks",
    "remove_stated_ranks_",
    "reserve_",
    "resize_",
    "resize_on_load",
    "restore_layout_",
    "save_adapter",
    "save_standalone",
    "split_again_",
    "split_into_heads_",
    "try_optimizer",
    "unfuse_",
    "unwrap_optimizer",
    "write_card",
]
