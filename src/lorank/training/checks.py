"""What must hold before a run starts, and before a saved one is continued: each with an error that says what to do."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lorank.allocators import Allocator, TrainingInfo
from lorank.errors import LorankError, OptimizerStateError, ResumeError, ScheduleError, ValidationBatchError
from lorank.lora import AdapterLayers, check_state
from lorank.scoring import validation_loss
from lorank.training.checkpoint.base_fingerprint import check_same_base
from lorank.training.checkpoint.state_schema import check_seal
from lorank.training.parallel.deepspeed import ZeroOptimizer
from lorank.training.parallel.fsdp import HOW

VERSION = 3

LossFn = Callable[[nn.Module, Mapping[str, Any]], Tensor]


def check_run(layers: AdapterLayers, optimizer: torch.optim.Optimizer, run: TrainingInfo) -> None:
    """The run and its optimiser.

    Raises:
        ScheduleError: no step to take.
        LorankError: parameters or optimiser state that are sharded over processes; ranks in a pool without DeepSpeed.
        OptimizerStateError: an optimiser that does not hold the LoRA parameters.
    """
    if run.total_steps < 1:
        raise ScheduleError(f"total_steps={run.total_steps}: expected the run's optimiser steps, at least 1")
    if any(layer.pool is not None for layer in layers.values()) and not isinstance(optimizer, ZeroOptimizer):
        raise LorankError(
            "lorank.reserve_ gives parameters the fixed shape that DeepSpeed's ZeRO needs, and the optimiser is "
            f"{type(optimizer).__name__}: hand in the one that deepspeed.initialize returned, or leave reserve_ out"
        )
    check_whole(layers, optimizer)
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for name, layer in layers.items():
        if id(layer.A) not in held or id(layer.B) not in held:
            raise OptimizerStateError(
                f"the optimiser does not hold the LoRA parameters of {name}: make it after get_peft_model, from "
                "the PEFT model's parameters, e.g. AdamW(p for p in model.parameters() if p.requires_grad)"
            )


def check_whole(layers: AdapterLayers, optimizer: torch.optim.Optimizer) -> None:
    """Ranks can only move where each process has the whole adapter and its whole optimiser state.

    Raises:
        LorankError: they are sharded.
    """
    whole = (
        f"A change of rank needs the whole adapter in every process, which costs little. {HOW} (docs/distributed.md)"
    )
    for name, layer in layers.items():
        if hasattr(layer.A, "placements") or hasattr(layer.B, "placements"):
            raise LorankError(f"the LoRA weights of {name} are sharded over processes (DTensor). {whole}")
    if any(type(module).__name__ == "FullyShardedDataParallel" for module in layers.model.modules()):
        raise LorankError(
            f"the model is wrapped in FullyShardedDataParallel (FSDP1), which flattens its parameters. {whole}"
        )
    if type(optimizer).__name__ == "ZeroRedundancyOptimizer":
        raise LorankError(
            "ZeroRedundancyOptimizer keeps each parameter's state in one process only, where it would not follow a "
            "change of rank. An adapter's state is small: use the optimiser itself"
        )


def check_batch(
    layers: AdapterLayers, allocator: Allocator, batch: Mapping[str, Any] | None, loss_fn: LossFn | None
) -> None:
    """The batch that ranks are scored on: one forward now, so that a mistake is not found out after an epoch.

    Raises:
        ValidationBatchError: there is none, or it cannot be scored on.
    """
    if not allocator.needs_validation_batch:
        return
    if batch is None:
        raise ValidationBatchError(
            f"{type(allocator).__name__} scores ranks on a fixed batch of held-out data and none was given: "
            "attach(…, validation_batch=batch), where model(**batch) gives a loss (32 samples in the paper)"
        )
    validation_loss(layers.model, layers, batch, loss_fn, first_look=True)


def check_optimizer_state(layers: AdapterLayers, optimizer: torch.optim.Optimizer) -> None:
    """PyTorch loads a state of any shape, and a fused optimiser then steps with it silently, or crashes."""
    for name, layer in layers.items():
        check_state(optimizer, f"{name}.lora_A", layer.A)
        check_state(optimizer, f"{name}.lora_B", layer.B)


def check_resumable(state: Mapping[str, Any], layers: AdapterLayers, allocator: Allocator, run: TrainingInfo) -> None:
    """Whether a saved rank state is whole, and of this run. Nothing is changed.

    Raises:
        ResumeError: it is damaged, or of another version, method, setting, seed, model or budget.
    """
    if not isinstance(state, Mapping):
        raise ResumeError(f"the saved rank state is a {type(state).__name__}: the optimiser's file is damaged")
    if state.get("version") != VERSION:
        raise ResumeError(f"the saved rank state has version {state.get('version')!r}, this lorank reads {VERSION}")
    check_seal(state)
    ours: dict[str, Any] = {**allocator.describe(), "seed": run.seed}
    theirs: dict[str, Any] = {**state["allocator"], "seed": state["seed"]}
    differing = sorted(key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key))
    if differing:
        listed = "; ".join(f"{key}: saved {theirs.get(key)!r}, now {ours.get(key)!r}" for key in differing)
        raise ResumeError(f"the checkpoint is of another run ({listed}). Resume with the settings it was made with")
    shapes = {name: (layer.d_in, layer.d_out) for name, layer in layers.items()}
    if {name: tuple(shape) for name, shape in state["shapes"].items()} != shapes:
        raise ResumeError(
            f"the checkpoint is of another model: its {len(state['shapes'])} adapted modules differ in name or "
            f"shape from the {len(shapes)} here. Load the base model that the run was started with, and adapt the "
            "same modules"
        )
    most = {name: max(min(shape), run.initial_ranks.get(name, 0)) for name, shape in shapes.items()}
    if state["ranks"].keys() != most.keys() or any(rank > most[name] for name, rank in state["ranks"].items()):
        raise ResumeError("the saved rank state has ranks that its modules cannot have: it was not written by a run")
    check_same_base(state["base"], layers)
    if state["initial_ranks"] != run.initial_ranks:
        saved, now = sum(state["initial_ranks"].values()), sum(run.initial_ranks.values())
        raise ResumeError(
            f"the checkpoint's run began with another budget: {saved} ranks in {len(shapes)} modules, here {now}. "
            "Make the model as that run did, with get_peft_model and the same LoraConfig, not from the checkpoint"
        )
