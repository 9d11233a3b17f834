"""Adapters of all kinds, as they are on disks: of lorank, and of others."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from lorank.lora import LayerPlan, find_layers, resize_
from tests.models import adapted, class_batch, tiny_bert, tiny_gpt2, tiny_llama, token_batch

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
KINDS: dict[str, tuple[Callable[[], PreTrainedModel], dict[str, Any]]] = {
    "lorank": (tiny_llama, {"r": 5, "lora_alpha": 10, "target_modules": TARGETS, "task_type": "CAUSAL_LM"}),
    "patterns": (
        tiny_llama,
        {
            "target_modules": TARGETS,
            "rank_pattern": {r"layers\.0\..*v_proj": 7, "down_proj": 1},
            "alpha_pattern": {"q_proj": 3},
        },
    ),
    "rslora": (tiny_llama, {"target_modules": ["q_proj", "v_proj"], "use_rslora": True, "rank_pattern": {"v_proj": 3}}),
    "embedding": (tiny_llama, {"target_modules": ["embed_tokens", "o_proj"], "rank_pattern": {"o_proj": 3}}),
    "conv1d": (tiny_gpt2, {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}),
    "dora": (tiny_llama, {"target_modules": ["q_proj", "down_proj"], "use_dora": True, "rank_pattern": {"q_proj": 2}}),
    "lora_bias": (tiny_bert, {"target_modules": ["query"], "lora_bias": True}),
    "biases": (tiny_bert, {"target_modules": ["query"], "bias": "all"}),
    "head": (tiny_bert, {"target_modules": ["query"], "modules_to_save": ["classifier"], "task_type": "SEQ_CLS"}),
    "new_tokens": (tiny_llama, {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [3, 5]}}),
}
PLAIN = ("lorank", "patterns", "rslora", "embedding", "conv1d")


def save(kind: str, folder: Path, *, weights: bool = False) -> tuple[Path, Path]:
    """Writes an adapter, and its base model's configuration or the whole model. Returns their folders."""
    make, settings = KINDS[kind]
    base, model = folder / "base", make()
    model.config.architectures = [type(model).__name__]  # as in every saved model
    (model if weights else model.config).save_pretrained(base)
    model = adapted(model, **settings)
    model.peft_config["default"].base_model_name_or_path = str(base)
    if kind == "lorank":
        layers = find_layers(model)
        sizes = {name: 1 + 2 * number % 5 for number, name in enumerate(layers)}
        first, second, *_ = layers
        plan = {name: LayerPlan(tuple(range(size))) for name, size in sizes.items()}
        plan[first] = LayerPlan(())  # rank 0: no module in the file
        plan[second] = LayerPlan((0, 1, 2, 3, 4), 6)
        resize_(layers, plan)
        layers[second].B.data.normal_(generator=torch.Generator().manual_seed(3))
    model.save_pretrained(folder / "adapter")
    return folder / "adapter", base


@torch.no_grad()
def logits(kind: str, adapter: Path | None, model: PreTrainedModel | None = None) -> Tensor:
    """The logits of the base model with the adapter, as PEFT loads it; or of a model."""
    make, _ = KINDS[kind]
    loaded = (PeftModel.from_pretrained(make(), adapter) if model is None else model).eval()
    batch = class_batch() if make is tiny_bert else token_batch()
    return loaded(**batch).logits
