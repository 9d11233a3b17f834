"""What must hold before a run starts: each check raises an error that names the remedy."""

from __future__ import annotations

import torch

from lorank.errors import LorankError, OptimizerStateError, ScheduleError, ValidationBatchError
from lorank.lora import AdapterLayers, check_state
from lorank.scoring import validation_loss
from lorank.training.parallel.deepspeed import ZeroOptimizer
from lorank.training.parallel.fsdp import HOW
from lorank.training.run_state import RunState


def check_run(run: RunState) -> None:
    """The run's length and its optimiser.

    Raises:
        ScheduleError: no step to take.
        LorankError: parameters or optimiser state that are sharded over processes; ranks in a pool without DeepSpeed.
        OptimizerStateError: an optimiser that does not hold the LoRA parameters.
    """
    layers, optimizer = run.layers, run.optimizer
    if run.info.total_steps < 1:
        raise ScheduleError(f"total_steps={run.info.total_steps}: expected the run's optimiser steps, at least 1")
    if any(layer.pool is not None for layer in layers.values()) and not isinstance(optimizer, ZeroOptimizer):
        raise LorankError(
            "lorank.reserve_ gives parameters the fixed shape that DeepSpeed's ZeRO needs, and the optimiser is "
            f"{type(optimizer).__name__}: hand in the one that deepspeed.initialize returned, or leave reserve_ out"
        )
    _check_whole(layers, optimizer)
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for name, layer in layers.items():
        if id(layer.A) not in held or id(layer.B) not in held:
            raise OptimizerStateError(
                f"the optimiser does not hold the LoRA parameters of {name}: make it after get_peft_model, from "
                "the PEFT model's parameters, e.g. AdamW(p for p in model.parameters() if p.requires_grad)"
            )


def _check_whole(layers: AdapterLayers, optimizer: torch.optim.Optimizer) -> None:
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


def check_batch(run: RunState) -> None:
    """The batch that ranks are scored on: one forward now, so that a mistake is not found out after an epoch.

    Raises:
        ValidationBatchError: there is none, or it cannot be scored on.
    """
    if not run.allocator.needs_validation_batch:
        return
    if run.validation_batch is None:
        raise ValidationBatchError(
            f"{type(run.allocator).__name__} scores ranks on a fixed batch of held-out data and none was given: "
            "attach(…, validation_batch=batch), where model(**batch) gives a loss (32 samples in the paper)"
        )
    validation_loss(run.layers.model, run.layers, run.validation_batch, run.loss_fn, one_pass=True)


def check_optimizer_state(run: RunState) -> None:
    """PyTorch loads a state of any shape, and a fused optimiser then steps with it silently, or crashes.

    Raises:
        OptimizerStateError: a state does not fit its parameter.
    """
    for name, layer in run.layers.items():
        check_state(run.optimizer, f"{name}.lora_A", layer.A)
        check_state(run.optimizer, f"{name}.lora_B", layer.B)
