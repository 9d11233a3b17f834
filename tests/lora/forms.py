"""Tiny Llamas in the forms that layers can have: with learned gates, with a LoRA per head, with reserved ranks."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

import lorank
from lorank.lora import AdapterLayers, find_layers, head_groups, split_into_heads_
from lorank.lora.gates import LearnedGates
from tests.lora.optimizers import trainable
from tests.models import adapted, tiny_llama, token_batch

Q, OUT, DOWN = (f"model.layers.0.{end}" for end in ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj"))
TARGETS = ["q_proj", "k_proj", "o_proj", "down_proj"]
ROOM = 7  # ranks that are reserved in every layer


def gated(seed: int = 0) -> tuple[PeftModel, AdapterLayers, LearnedGates]:
    """A model in float64 with random gates between 0.5 and 1.5."""
    model = adapted(tiny_llama()).double()
    layers = find_layers(model)
    values = torch.rand(layers.total_rank, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.5
    return model, layers, layers.learn_gates(values)


def in_heads(
    base: PreTrainedModel | None = None, r0: int = 2, **lora: Any
) -> tuple[PeftModel, AdapterLayers, torch.optim.Optimizer]:
    """A model whose projections have ``r0`` ranks per head, B random."""
    model = adapted(base or tiny_llama(), random_B=False, **{"target_modules": TARGETS, **lora})
    layers = find_layers(model)
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    split_into_heads_(layers, head_groups(layers), optimizer, r0)
    generator = torch.Generator().manual_seed(1)
    for layer in layers.values():
        layer.B.data = torch.randn(layer.B.shape, generator=generator) * 0.2
    return model, layers, optimizer


def plain_and_reserved() -> tuple[PeftModel, PeftModel]:
    """A model in float64, and the same with reserved ranks."""
    plain, roomy = (adapted(tiny_llama()).double().eval() for _ in range(2))
    return plain, lorank.reserve_(roomy, ROOM)


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model.eval()(**token_batch(padded=True)).logits
