"""An adapter for these checks: the packaged tiny Llama, ranks from 1 to 13, two factors, a module at rank 0."""

from __future__ import annotations

import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from lorank.experiments.models import resolve

BASE = resolve("tiny")
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
NOT_INSTALLED = 77
LIMIT = 1e-5
"""The largest difference that passes, relative to the largest number that PEFT gives."""


def need(*modules: str) -> None:
    """Ends the script with status 77 if a module is not installed."""
    missing = [module for module in modules if find_spec(module) is None]
    if missing:
        print(f"not run: {missing[0]} is not installed")
        sys.exit(NOT_INSTALLED)


def save_example(folder: Path) -> Path:
    """Writes the adapter as lorank saves it, and returns its folder."""
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(BASE)
    modules = [name for name, _ in base.named_modules() if name.rpartition(".")[2] in PROJECTIONS]
    modules.remove("model.layers.3.mlp.up_proj")
    ranks = {name: 1 + 5 * number % 13 for number, name in enumerate(modules)}
    factors = {name: 0.5 if "o_proj" in name else 2.0 for name in modules}
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=8,
        lora_alpha=16,
        target_modules=modules,
        rank_pattern={f"^{name}": rank for name, rank in ranks.items()},
        alpha_pattern={f"^{name}": factors[name] * rank for name, rank in ranks.items()},
    )
    model: Any = get_peft_model(base, config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    model.save_pretrained(folder)
    return folder


def tokens() -> Tensor:
    """Token numbers, (1, 48)."""
    return torch.randint(4, 4096, (1, 48), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def peft_logits(adapter: Path | None) -> Tensor:
    """PEFT's logits of :func:`tokens`, (48, vocabulary); of the base model without an adapter."""
    model: Any = AutoModelForCausalLM.from_pretrained(BASE)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
    logits: Tensor = model.eval()(tokens()).logits[0].float()
    return logits


def report(program: str, package: str, form: str, found: Tensor, wanted: Tensor, what: str = "logits") -> bool:
    """Prints the difference and returns whether it passes."""
    difference = float((found.double() - wanted.double()).abs().max() / wanted.double().abs().max())
    print(
        f"{program} {version(package)}, {form}: largest difference of {what} {difference:.1e} of the largest",
        flush=True,
    )
    return difference <= LIMIT
