"""PEFT's own objects, for folders that do not import PEFT."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from torch import nn


def make_peft_model(model: nn.Module, **lora_config: Any) -> nn.Module:
    """``get_peft_model(model, LoraConfig(**lora_config))``."""
    return get_peft_model(model, LoraConfig(**lora_config))  # type: ignore[no-any-return]  # PEFT is untyped


def make_lora_plus_optimizer(
    model: nn.Module, kind: type[torch.optim.Optimizer], *, ratio: float, weight_decay: float, **settings: Any
) -> torch.optim.Optimizer:
    """PEFT's optimiser with parameter groups for LoRA+ (Hayou et al., ICML 2024, arXiv 2402.12354).

    Args:
        model: the model with its adapter.
        kind: the class of the optimiser.
        ratio: the learning rate of B as a multiple of ``lr``, which is that of A and of modules trained in full. > 0.
        weight_decay: of all matrices.
        settings: ``lr`` and further arguments of the class.
    """
    return create_loraplus_optimizer(  # type: ignore[no-any-return]  # PEFT is untyped
        model, kind, loraplus_lr_ratio=ratio, loraplus_weight_decay=weight_decay, **settings
    )
