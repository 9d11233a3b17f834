"""Coordinates the processes of a run, for every backend: averages gates, divides scoring and checks consistency.

With one process there is nothing to do.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lorank.allocators import Allocation
from lorank.training.integrations.base import Integration
from lorank.training.parallel.consistency import require_same_tensors, require_same_text
from lorank.training.parallel.process_group import ProcessGroup
from lorank.training.run_state import RunState

_SAME_START = (
    "Make the model, the adapter and lorank in the same way in all processes: torch.manual_seed before get_peft_model "
    "(or wrap the model in DistributedDataParallel before attach, which copies process 0's weights), the same "
    "settings, the same batch"
)
_SAME_STEP = (
    "Gradients must be averaged over the processes before every optimiser step: train through "
    "DistributedDataParallel, FSDP2 (lorank.shard_base_) or accelerate, step in all processes, and skip a step in all "
    "or none"
)


class ProcessCoordinator(Integration):
    """Keeps the processes consistent, and stops the run if they differ.

    Args:
        processes: the processes that train the model.
        lockstep: whether a forward pass needs all processes at once.
    """

    def __init__(self, processes: ProcessGroup, *, lockstep: bool) -> None:
        self.processes = processes
        self._lockstep = lockstep

    def on_start(self, run: RunState) -> None:
        """Raises DisagreementError if method, settings, run, initial ranks or validation batch differ."""
        if not self.processes.several:
            return
        # Each process does a part of scoring, or all of it if a forward pass needs all processes.
        run.share = self.processes.lockstep() if self._lockstep else self.processes
        info, batch = run.info, run.validation_batch
        settings = {**run.allocator.describe(), "seed": info.seed, "total_steps": info.total_steps}
        settings["steps_per_epoch"] = info.steps_per_epoch
        settings |= {f"rank of {name}": rank for name, rank in info.initial_ranks.items()}
        if batch is None:
            settings["validation batch"] = None
        else:
            settings |= {f"validation batch's {key}": _describe(value) for key, value in batch.items()}
        lines = "\n".join(f"{name}: {value!r}" for name, value in settings.items())
        require_same_text(self.processes, lines, "settings", _SAME_START)
        tensors = {key: value for key, value in (batch or {}).items() if isinstance(value, Tensor)}
        require_same_tensors(self.processes, tensors, "validation batch", _SAME_START)

    def before_step(self, run: RunState) -> None:
        """Averages the gradients of learned gates, which are no parameters of the model that a backend averages."""
        if run.layers.gates is not None:
            self.processes.mean_(run.layers.gates.grad)

    def on_decision(self, run: RunState, allocation: Allocation | None) -> None:
        """Raises DisagreementError if the processes have decided on different plans."""
        if not self.processes.several:
            return
        plan = {} if allocation is None else allocation.plan
        lines = [f"allocation: {allocation is not None}", *(f"{name}: {change}" for name, change in plan.items())]
        require_same_text(self.processes, "\n".join(lines), f"plan after step {run.step}", _SAME_STEP)

    def after_allocation(self, run: RunState) -> None:
        """Raises DisagreementError if ranks, trained weights, optimiser, gates or the method's memory differ."""
        if not self.processes.several:
            return
        layers = run.layers
        lines = "\n".join(f"{name}: {layer.head_ranks}" for name, layer in layers.items())
        advice = _SAME_STEP if run.step else _SAME_START
        require_same_text(self.processes, lines, f"ranks after step {run.step}", advice)
        tensors = dict(_trained_tensors(run.trained_model, run.optimizer))
        if layers.gates is not None:
            tensors["gates"] = layers.gates.values
        tensors |= {f"{name} of the method's state": value for name, value in run.memory.items()}
        require_same_tensors(self.processes, tensors, f"adapter after step {run.step}", advice)


def _trained_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, Tensor]]:
    """Yields, by name, every parameter that the optimiser holds unsharded, and its state."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for index, parameter in enumerate(parameters):
        if hasattr(parameter, "placements"):  # sharded: each process has another part
            continue
        name = names.get(id(parameter), f"parameter {index}")
        yield name, parameter
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                yield f"{key} of {name}", value


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{tuple(value.shape)} {value.dtype}"
    return repr(value) if isinstance(value, str | int | float | bool | None) else type(value).__name__
