"""Checks before a run starts. Each check raises an error that says what to do."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

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
from lorank.lora import AdapterLayers, check_base_unchanged, check_state, copies_weights, try_optimizer
from lorank.scoring import validation_loss
from lorank.scoring.prefix_cache.block_skipping import replaced_forward
from lorank.scoring.preserve_state import preserve_state
from lorank.training.parallel.deepspeed import ZeroOptimizer
from lorank.training.parallel.fsdp import SHARD_BASE_ADVICE
from lorank.training.run_state import RunState

logger = logging.getLogger("lorank")
OTHER_METHODS = "a method that needs no such batch: ALoRASensi, AdaLoRA, SoRA, ARDLoRA or BalancedLoRA(init='default')"
"""For trainers without a loss on given samples, such as reinforcement learning."""


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
    """Checks the run's length, its adapter and its optimiser.

    Raises:
        ScheduleError: ``total_steps`` is less than 1.
        LorankError: parameters or optimiser state are sharded over processes, or layers have a pool without DeepSpeed.
        AdapterError: the method moves ranks, and the adapter's initialisation changed the base weights.
        OptimizerStateError: the optimiser does not hold the LoRA parameters.
        AdapterError: the model that is trained does not contain the adapter's model, or its forward pass does not use
            the adapter.
    """
    layers, optimizer = run.layers, run.optimizer
    check_in_use(layers)
    if run.info.total_steps < 1:
        raise ScheduleError(
            f"total_steps={run.info.total_steps}: expected the number of optimiser steps of the run, at least 1"
        )
    if any(layer.pool is not None for layer in layers.values()) and not isinstance(optimizer, ZeroOptimizer):
        raise LorankError(
            "lorank.reserve_ gives parameters the fixed shape that DeepSpeed's ZeRO needs, but the optimiser is "
            f"{type(optimizer).__name__}: pass the optimiser that deepspeed.initialize returned, or leave out reserve_"
        )
    if run.allocator.moves_ranks:
        check_base_unchanged(layers, f"{type(run.allocator).__name__}, which moves ranks,")
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


def check_in_use(layers: AdapterLayers) -> None:
    """Checks that the forward pass uses the adapter. Otherwise scores and gradients would be those of another model.

    Raises:
        AdapterError: the adapter is not active, is disabled, or is merged into the base weights.
    """
    for name, layer in layers.items():
        module, adapter = layer.module, layer.adapter
        if module.merged:
            reason = f"is merged into the base weights of {name}: call model.unmerge_adapter()"
        elif module.disable_adapters:
            reason = "is disabled: leave model.disable_adapter(), or call model.enable_adapters()"
        elif adapter not in module.active_adapters:
            active = ", ".join(module.active_adapters) or "none"
            reason = f"is not active in {name} (active: {active}): call model.set_adapter({adapter!r})"
        else:
            continue
        raise AdapterError(
            f"adapter {adapter!r} {reason} before optimizer.step() and before a run begins. Ranks are scored by the "
            "model's forward pass, which does not use the adapter now"
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
            "attach(…, validation_batch=batch), where model(**batch) gives a loss (32 samples in the paper), "
            f"or {OTHER_METHODS}"
        )
    with _uncalled(run.layers) as uncalled:
        try:
            validation_loss(run.trained_model, run.layers, run.validation_batch, run.loss_fn, one_pass=True)
        except ValidationBatchError as error:
            raise ValidationBatchError(
                f"{error}. If no batch gives a loss with this model, use {OTHER_METHODS}"
            ) from error.__cause__
    _check_called(run, uncalled)


@contextmanager
def _uncalled(layers: AdapterLayers) -> Iterator[list[str]]:
    """Yields the names of all layers; each layer that is called inside is removed from the list.

    A layer's ``forward`` is replaced, because a hook would change how nn.TransformerEncoderLayer computes.
    """
    names = list(layers)

    def watched(name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if name in names:
                names.remove(name)
            return forward(*args, **kwargs)

        return call

    with ExitStack() as stack:
        for name, layer in layers.items():
            stack.enter_context(replaced_forward(layer.module, watched(name, layer.module.forward)))
        yield names


def _check_called(run: RunState, uncalled: list[str]) -> None:
    """Refuses a run that would score no layer, and warns about layers whose scores would say nothing.

    Args:
        uncalled: the layers that the model did not call on the validation batch.

    Raises:
        ValidationBatchError: the model has called no layer.
    """
    if not uncalled:
        return
    advice = (
        "In evaluation mode, nn.TransformerEncoderLayer computes without calling its layers: call "
        "torch.backends.mha.set_fastpath_enabled(False) first"
    )
    if len(uncalled) == len(run.layers):
        raise ValidationBatchError(
            f"the loss on the validation batch calls none of the {len(uncalled)} adapted modules in evaluation mode, "
            f"so every rank would have the same score. Give a batch, or a loss_fn, for which they run. {advice}"
        )
    logger.warning(
        "%d of %d adapted modules do not run on the validation batch in evaluation mode (%s), so the scores of their "
        "ranks say nothing. Give a batch for which they run, or adapt other modules. %s",
        len(uncalled),
        len(run.layers),
        ", ".join(uncalled[:3]) + (", …" if len(uncalled) > 3 else ""),
        advice,
    )


def require_trainable(run: RunState) -> None:
    """Checks before an optimiser step that nobody has merged the layers or taken their gates away.

    A merged layer passes no gradient to A and B. A gate may move in such a step all the same, and then the merge could
    not be taken back exactly.

    Raises:
        AdapterError: a layer is merged into its base weight, or has lost its gate.
    """
    leaves = {} if run.layers.gates is None else run.layers.gates.leaves
    for name, layer in run.layers.items():
        if layer.module.merged:
            raise AdapterError(
                f"{name} is merged into the base weights, so this step would not train it. Call "
                "model.unmerge_adapter() before the forward pass of each training step"
            )
        if run.learns_gates and not run.finished and (layer.gate is None or layer.gate is not leaves.get(name)):
            raise AdapterError(
                f"the gate of {name} was removed or replaced during the run, so {type(run.allocator).__name__} cannot "
                "go on. Saving and merging (save_pretrained, merge_adapter, merge_and_unload) include the gates: call "
                "lorank.lora.fold_gates_ only after ranks.finish(). To go on, resume from the last checkpoint"
            )


def try_scoring(run: RunState) -> None:
    """Tries once what the method will do with the validation batch. Afterwards everything is as it was before.

    Raises:
        ValidationBatchError: the batch, the model or ``loss_fn`` cannot be used for the method's scores.
    """
    if run.finished:
        return
    layers, gates = run.layers, run.layers.gates
    before = None if gates is None else (gates, gates.values.clone(), [x.requires_grad for x in gates.leaves.values()])
    memory = copy.deepcopy(run.memory)
    try:
        context = replace(run.context(), share=None)
        with preserve_state(context.model, layers):
            run.allocator.try_out(context, memory)
    finally:
        if before is not None:
            gates, values, wanted = before
            gates.values.copy_(values)
            for leaf, trained in zip(gates.leaves.values(), wanted, strict=True):
                leaf.requires_grad_(trained)


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
