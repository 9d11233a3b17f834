"""The model of a run before its first step: base and adapter, with ranks and directions from data if asked for."""

from __future__ import annotations

import logging
import re
import time
from typing import Literal

from torch import nn
from transformers import PreTrainedModel

from lorank.allocators import Context, TrainingInfo, gradient_start_, initial_ranks_
from lorank.config.settings import FullSettings, RunConfig
from lorank.experiments.errors import SettingsError
from lorank.experiments.models import load_model
from lorank.lora import find_layers, make_peft_model, plan_for_rank, resize_
from lorank.tasks import Task

logger = logging.getLogger("lorank")

PEFT_INITS = ("pissa", "olora", "orthogonal")
"""Values of ``lora.init`` that PEFT knows."""
_TASK_TYPES = {"causal_lm": "CAUSAL_LM", "sequence_classification": "SEQ_CLS", "image_classification": None}
"""PEFT's names; it has none for images."""


def adapted_model(config: RunConfig, task: Task) -> nn.Module:
    """The base model with a new adapter; for full fine-tuning, the base model with all weights trainable."""
    base = load_model(config.model, task)
    if isinstance(config.allocator, FullSettings):
        return base.requires_grad_()
    lora = config.lora
    targets = lora.target_modules
    saved = list(lora.modules_to_save or ())
    heads = _heads(base) if task.model_kind == "image_classification" else []
    try:
        model = make_peft_model(
            base,
            task_type=_TASK_TYPES[task.model_kind],
            r=lora.r,
            lora_alpha=lora.alpha,
            lora_dropout=lora.dropout,
            target_modules=targets if isinstance(targets, str) else list(targets),
            target_parameters=list(lora.target_parameters) if lora.target_parameters else None,
            # of a classifier of texts, PEFT knows the head
            modules_to_save=list(dict.fromkeys([*saved, *heads])) or None,
            init_lora_weights=lora.init if lora.init in PEFT_INITS else True,
            exclude_modules=heads or None,
            use_rslora=lora.use_rslora,
            use_dora=lora.use_dora,
        )
    except ValueError as error:  # PEFT raises it if no module has such a name
        raise SettingsError(f"lora.target_modules {targets!r} does not fit {config.model.name!r}: {error}") from error
    names = list(find_layers(model)) if lora.target_parameters else []
    for wanted in lora.target_parameters or ():
        if not any(f".{name}".endswith(f".{wanted}") for name in names):
            raise SettingsError(f"lora.target_parameters: {config.model.name!r} has no parameter {wanted!r} to adapt")
    if lora.rank_pattern:
        _give_ranks_(config, model)
    return model


def _heads(base: PreTrainedModel) -> list[str]:
    """The names of the modules with weights beside the pretrained part."""
    return [name for name, part in base.named_children() if name != base.base_model_prefix and list(part.parameters())]


def _give_ranks_(config: RunConfig, model: nn.Module) -> None:
    """Gives the modules in ``lora.rank_pattern`` their ranks, which may be 0. The factor of the update stays."""
    layers, pattern = find_layers(model), config.lora.rank_pattern or {}
    keys = {name: next((key for key in pattern if re.fullmatch(rf"(.*\.)?({key})", name)), None) for name in layers}
    for key in pattern:
        if key not in keys.values():
            raise SettingsError(
                f"lora.rank_pattern: no adapted module is called {key!r}; there are {', '.join(list(layers)[:3])}, …"
            )
    plan = {name: plan_for_rank(layers[name].rank, pattern[key]) for name, key in keys.items() if key is not None}
    resize_(layers, plan, seed=config.training.seed)


def spread_ranks(config: RunConfig, task: Task, model: nn.Module) -> None:
    """Sets initial ranks and directions from data, if the configuration asks for it.

    A resumed run computes the same ones again.
    """
    lora = config.lora
    if lora.init in PEFT_INITS:
        return
    spread = lora.initial_ranks or ("gradient" if lora.init == "gradient" else "uniform")
    if (lora.init == "default" and spread == "uniform") or isinstance(config.allocator, FullSettings):
        return
    settings, began = config.training, time.perf_counter()
    examples = task.train[: config.lora.initial_batches * settings.batch_size]
    parts = [examples[start : start + settings.batch_size] for start in range(0, len(examples), settings.batch_size)]
    # If the allocator starts at its budget, that budget is distributed. If it starts above its budget and prunes, the
    # adapter's own ranks are distributed.
    asked = f"lora.initial_ranks is {spread!r}" + (" and lora.init 'gradient'" if lora.init == "gradient" else "")
    allocator, run, layers = config.allocator.build(), TrainingInfo(total_steps=1), find_layers(model)
    if allocator.heads_of(layers):
        raise SettingsError(
            f"{asked}, but the allocator {config.allocator.name!r} starts with ranks of its own for every head, which "
            "would undo them: set lora.initial_ranks to uniform and lora.init to default"
        )
    if allocator.wants_train_batches:
        raise SettingsError(
            f"{asked}, but the allocator {config.allocator.name!r} itself takes ranks and directions from the "
            "gradient: leave both out"
        )
    budget, plan = allocator.resolve_budget(layers, run), allocator.initial_plan(Context(0, run, model, layers))
    start = {name: plan[name].rank if name in plan else layer.rank for name, layer in layers.items()}
    at_budget = budget is not None and start == budget.uniform()
    batches = [task.collator(part) for part in parts]
    chosen = getattr(allocator, "budget", None) if at_budget else None
    if lora.init == "gradient":
        keep = spread == "uniform"
        ranks = gradient_start_(
            model,
            batches,
            ranks="keep" if keep else "gradient",
            budget=None if keep else chosen,
            seed=settings.seed,
        )
    else:
        method: Literal["gradient", "eva"] = "eva" if spread == "eva" else "gradient"
        ranks = initial_ranks_(model, batches, method=method, budget=chosen, seed=settings.seed)
    logger.info(
        "initial ranks by %s%s on %d batches in %.1f s: %d to %d in %d modules",
        spread,
        ", directions by gradient" if lora.init == "gradient" else "",
        len(parts),
        time.perf_counter() - began,
        min(ranks.values()),
        max(ranks.values()),
        len(ranks),
    )


def size_of(model: nn.Module) -> dict[str, int]:
    """Total rank, number of LoRA modules, and trainable parameters (including heads that are trained in full)."""
    layers = find_layers(model) if hasattr(model, "peft_config") else None
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    ranks = {"ranks": layers.total_rank, "modules": len(layers)} if layers else {"ranks": 0, "modules": 0}
    return {**ranks, "trainable_parameters": trainable}
