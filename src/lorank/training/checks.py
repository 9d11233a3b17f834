"""Checks before a run starts. Each check raises an error that says what to do."""

from __future__ import annotations

import torch

from lorank.errors import LorankError, OptimizerStateError, ScheduleError, ValidationBatchError
from lorank.lora import AdapterLayers, check_state, copies_weights, try_optimizer
from lorank.scoring import validation_loss
from lorank.training.parallel.deepspeed import ZeroOptimizer
from lorank.training.parallel.fsdp import SHARD_BASE_ADVICE
from lorank.training.run_state import RunState


def check_run(run: RunState) -> None:
    """Checks the run's length and its optimiser.

    Raises:
        ScheduleError: ``total_steps`` is less than 1.
        LorankError: parameters or optimiser state are sharded over processes, or layers have a pool without DeepSpeed.
        OptimizerStateError: the optimiser does not hold the LoRA parameters.
    """
    layers, optimizer = run.layers, run.optimizer
    if run.info.total_steps < 1:
        raise ScheduleError(
            f"total_steps={run.info.total_steps}: expected the number of optimiser steps of the run, at least 1"
        )
    if any(layer.pool is not None for layer in layers.values()) and not isinstance(optimizer, ZeroOptimizer):
        raise LorankError(
            "lorank.reserve_ gives parameters the fixed shape that DeepSpeed's ZeRO needs, but the optimiser is "
            f"{type(optimizer).__name__}: pass the optimiser that deepspeed.initialize returned, or leave out reserve_"
        )
    _check_not_sharded(layers, optimizer)
    held_ids = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for name, layer in layers.items():
        if id(layer.A) not in held_ids or id(layer.B) not in held_ids:
            raise OptimizerStateError(
                f"the optimiser does not hold the LoRA parameters of {name}: make it after get_peft_model, from "
                "the PEFT model's parameters, e.g. AdamW(p for p in model.parameters() if p.requires_grad)"
            )


def _check_not_sharded(layers: AdapterLayers, optimizer: torch.optim.Optimizer) -> None:
    """Checks that each process has the complete adapter and its complete optimiser state, as every resize needs.

    Raises:
        LorankError: the adapter or its optimiser state is sharded.
    """
    advice = (
        "A change of rank needs the complete adapter in every process, which costs little memory. "
        f"{SHARD_BASE_ADVICE} (docs/distributed.md)"
    )
    for name, layer in layers.items():
        if hasattr(layer.A, "placements") or hasattr(layer.B, "placements"):
            raise LorankError(f"the LoRA weights of {name} are sharded over processes (DTensor). {advice}")
    if any(type(module).__name__ == "FullyShardedDataParallel" for module in layers.model.modules()):
        raise LorankError(
            f"the model is wrapped in FullyShardedDataParallel (FSDP1), which flattens its parameters. {advice}"
        )
    if type(optimizer).__name__ == "ZeroRedundancyOptimizer":
        raise LorankError(
            "ZeroRedundancyOptimizer keeps each parameter's state in one process only, where lorank cannot resize it. "
            "An adapter's state is small: use the optimiser without ZeroRedundancyOptimizer"
        )


def check_batch(run: RunState) -> None:
    """Checks the validation batch by one forward pass, so that a mistake shows before training and not after an epoch.

    Raises:
        ValidationBatchError: the method needs a batch and none was given, or the batch gives no usable loss.
    """
    if not run.allocator.needs_validation_batch:
        return
    if run.validation_batch is None:
        raise ValidationBatchError(
            f"{type(run.allocator).__name__} scores ranks on a fixed batch of held-out data, and none was given: use "
            "attach(…, validation_batch=batch), where model(**batch) gives a loss (32 samples in the paper)"
        )
    validation_loss(run.layers.model, run.layers, run.validation_batch, run.loss_fn, one_pass=True)


def check_optimizer_state(run: RunState) -> None:
    """Checks the shapes of the optimiser's state.

    PyTorch loads a state of any shape. A fused optimiser then uses it silently, or crashes.

    Raises:
        OptimizerStateError: a state does not fit its parameter.
    """
    for name, layer in run.layers.items():
        check_state(run.optimizer, f"{name}.lora_A", layer.A)
        check_state(run.optimizer, f"{name}.lora_B", layer.B)


def check_state_follows(run: RunState) -> None:
    """Checks on copies that the optimiser's state can follow a change of ranks. Call it when there is a state.

    Raises:
        OptimizerStateError: it cannot, or lorank does not know this.
    """
    if run.allocator.moves_ranks and not isinstance(run.optimizer, ZeroOptimizer):
        try_optimizer(run.optimizer, run.layers)


def check_weight_copies(run: RunState) -> None:
    """Checks that no optimiser keeps copies of weights that lorank will change by other means than a step.

    Raises:
        OptimizerStateError: the optimiser keeps copies, and gates or heads will be folded into B.
    """
    has_heads = any(layer.groups is not None for layer in run.layers.values())
    if copies_weights(run.optimizer) and (run.layers.gates is not None or has_heads):
        raise OptimizerStateError(
            f"{type(run.optimizer).__name__} keeps copies of the weights, and {type(run.allocator).__name__} changes B "
            "when it folds its gates or heads into it, which the copies would not follow. Use AdamW, or a method "
            "without gates (ALoRA)"
        )
