"""Checks before a run starts. Each check raises an error that says what to do."""

from __future__ import annotations

from lorank.allocators import Allocator
from lorank.allocators.registry import OWN
from lorank.errors import (
    AdapterError,
    AllocatorError,
    LorankError,
    OptimizerStateError,
    ScheduleError,
    ValidationBatchError,
)
from lorank.lora import check_state
from lorank.scoring import validation_loss
from lorank.training.parallel.deepspeed import ZeroOptimizer
from lorank.training.parallel.fsdp import SHARD_BASE_ADVICE
from lorank.training.run_state import RunState


def check_allocator(given: object, caller: str) -> None:
    """Checks that a method with its settings was given, not its name or its class.

    Args:
        given: what the user gave.
        caller: the function that the user called, for the message.

    Raises:
        AllocatorError: it is not an allocator.
    """
    if isinstance(given, Allocator):
        return
    if isinstance(given, type) and issubclass(given, Allocator):
        what, advice = f"the class {given.__name__}", f"make it with its settings: {given.__name__}()"
    else:
        what = repr(given) if isinstance(given, str) else f"a {type(given).__name__}"
        known = {name: value.rpartition(":")[2] for name, value in OWN.items()}
        method = known.get(given) if isinstance(given, str) else None
        others = ", ".join(f"lorank.{name}()" for name in known.values())
        advice = f"give lorank.{method}(), with its settings" if method else f"give one of {others}"
    raise AllocatorError(f"{caller}: the method is {what}, expected an allocator: {advice}")


def check_run(run: RunState) -> None:
    """Checks the run's length and its optimiser.

    Raises:
        ScheduleError: ``total_steps`` is less than 1.
        LorankError: parameters or optimiser state are sharded over processes, or layers have a pool without DeepSpeed.
        OptimizerStateError: the optimiser does not hold the LoRA parameters.
        AdapterError: the model that is trained does not contain the adapter's model.
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
    if all(module is not layers.model for module in run.model.modules()):
        raise AdapterError(
            f"the {type(layers.model).__name__} that holds the adapter is not a part of the {type(run.model).__name__} "
            "that is trained: give the model that the loop trains, or a module inside it"
        )
    _check_not_sharded(run)
    held_ids = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for name, layer in layers.items():
        if id(layer.A) not in held_ids or id(layer.B) not in held_ids:
            raise OptimizerStateError(
                f"the optimiser does not hold the LoRA parameters of {name}: make it after get_peft_model, from "
                "the PEFT model's parameters, e.g. AdamW(p for p in model.parameters() if p.requires_grad)"
            )


def _check_not_sharded(run: RunState) -> None:
    """Checks that each process has the complete adapter and its complete optimiser state, as every resize needs.

    Raises:
        LorankError: the adapter or its optimiser state is sharded.
    """
    advice = (
        "A change of rank needs the complete adapter in every process, which costs little memory. "
        f"{SHARD_BASE_ADVICE} (docs/distributed.md)"
    )
    for name, layer in run.layers.items():
        if hasattr(layer.A, "placements") or hasattr(layer.B, "placements"):
            raise LorankError(f"the LoRA weights of {name} are sharded over processes (DTensor). {advice}")
    if any(type(module).__name__ == "FullyShardedDataParallel" for module in run.model.modules()):
        raise LorankError(
            f"the model is wrapped in FullyShardedDataParallel (FSDP1), which flattens its parameters. {advice}"
        )
    if type(run.optimizer).__name__ == "ZeroRedundancyOptimizer":
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
    validation_loss(run.trained_model, run.layers, run.validation_batch, run.loss_fn, one_pass=True)


def check_optimizer_state(run: RunState) -> None:
    """Checks the shapes of the optimiser's state.

    PyTorch loads a state of any shape. A fused optimiser then uses it silently, or crashes.

    Raises:
        OptimizerStateError: a state does not fit its parameter.
    """
    for name, layer in run.layers.items():
        check_state(run.optimizer, f"{name}.lora_A", layer.A)
        check_state(run.optimizer, f"{name}.lora_B", layer.B)
