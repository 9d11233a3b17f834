"""What a run asks of the other processes that train the same model. In one process there is nothing to ask."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lorank.allocators import Allocation, Allocator, TrainingInfo
from lorank.allocators.base import State
from lorank.errors import LorankError
from lorank.lora import AdapterLayers
from lorank.scoring import Share
from lorank.training.parallel.consistency import require_same_tensors, require_same_text
from lorank.training.parallel.ddp import Reducers
from lorank.training.parallel.deepspeed import ZeroOptimizer, gathered
from lorank.training.parallel.fsdp import average_gradients_, is_sharded
from lorank.training.parallel.process_group import ProcessGroup

_SAME_START = (
    "Make model, adapter and lorank alike in all of them: torch.manual_seed before get_peft_model (or wrap the model "
    "in DistributedDataParallel before attach, which copies process 0's weights), the same settings, the same batch"
)
_SAME_STEP = (
    "Gradients must be averaged over the processes before every optimiser step: train through "
    "DistributedDataParallel, FSDP2 (lorank.shard_base_) or accelerate, step in all processes, and skip a step in all "
    "or none"
)


class ProcessCoordinator:
    """The processes that a run's ranks are shared by.

    Args:
        layers: the LoRA layers, the same modules in every process.
        outer: the model as the loop calls it, where that is known.
        optimizer: the one that steps.
    """

    def __init__(self, layers: AdapterLayers, outer: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.processes = ProcessGroup.now(next(iter(layers.values())).A.device)
        self._layers, self._optimizer = layers, optimizer
        self._zero = optimizer if isinstance(optimizer, ZeroOptimizer) else None
        fsdp = self.processes.several and is_sharded(layers.model)
        self._lockstep = fsdp or (self._zero is not None and self._zero.sharded)
        ddp = self.processes.several and not fsdp and self._zero is None
        self._reducers = Reducers(layers.model, outer) if ddp else None
        if fsdp:
            average_gradients_(layers.model, self.processes)

    @property
    def share(self) -> Share | None:
        """This process's share of scoring: a part of it, or all of it where forward passes need all processes."""
        if self._lockstep and self.processes.several:
            return self.processes.lockstep()
        return self.processes if self.processes.several else None

    def begin(self) -> None:
        """The run is about to hang on its optimiser."""
        if self._zero is not None:
            self._zero.take_over()

    def close(self) -> None:
        if self._reducers is not None:
            self._reducers.close()
        if self._zero is not None:
            self._zero.close()

    def fetch(self) -> None:
        """The layers' weights, and their moments, are about to be looked at: under ZeRO they are elsewhere."""
        if self._zero is not None:
            self._zero.fetch()

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Inside, this process has the whole adapter in its model; afterwards all processes have come this far."""
        with gathered(self._layers):
            yield
        self.processes.wait()

    @contextmanager
    def gradients(self, allocator: Allocator) -> Iterator[None]:
        """Inside, the layers' gradients can be seen and changed, if the method does so."""
        if self._zero is None or not allocator.sees_gradients:
            yield
            return
        self._zero.fetch()
        self._zero.fetch_gradients()
        yield
        self._zero.store_gradients()

    def check_start(self, allocator: Allocator, run: TrainingInfo, batch: Mapping[str, Any] | None) -> None:
        """Raises DisagreementError if method, settings, run, ranks or validation batch differ.

        And LorankError for a method that ZeRO-3 cannot serve.
        """
        if self._zero is not None and self._zero.sharded and allocator.own_backward:
            raise LorankError(
                f"{type(allocator).__name__} makes backward passes of its own, for which ZeRO-3 does not gather what "
                "they need: use ZeRO-2, or scores from forward passes (ALoRA with scores='exact')"
            )
        if not self.processes.several:
            return
        settings = {**allocator.describe(), "seed": run.seed, "total_steps": run.total_steps}
        settings["steps_per_epoch"] = run.steps_per_epoch
        settings |= {f"rank of {name}": rank for name, rank in run.initial_ranks.items()}
        if batch is None:
            settings["validation batch"] = None
        else:
            settings |= {f"validation batch's {key}": _described(value) for key, value in batch.items()}
        lines = "\n".join(f"{name}: {value!r}" for name, value in settings.items())
        require_same_text(self.processes, lines, "settings", _SAME_START)
        tensors = {key: value for key, value in (batch or {}).items() if isinstance(value, Tensor)}
        require_same_tensors(self.processes, tensors, "validation batch", _SAME_START)

    def average_gates(self) -> None:
        """Learned gates are no parameters of the model, so nobody else averages their gradients."""
        if self._layers.gates is not None:
            self.processes.mean_(self._layers.gates.grad)

    def check_decision(self, step: int, allocation: Allocation | None) -> None:
        """Raises DisagreementError if the processes are about to move different ranks; nothing has moved yet."""
        if not self.processes.several:
            return
        plan = {} if allocation is None else allocation.plan
        lines = [f"allocation: {allocation is not None}", *(f"{name}: {change}" for name, change in plan.items())]
        what = f"plan after step {step}"
        require_same_text(self.processes, "\n".join(lines), what, _SAME_STEP)

    def follow(self) -> None:
        """Ranks have moved: what holds on to the old shapes is made anew, and who has copies gets the new ones."""
        if self._reducers is not None:
            self._reducers.rebuild()
        if self._zero is not None:
            self._zero.store()

    def check_state(self, step: int, state: State) -> None:
        """Raises DisagreementError if ranks, trained weights, optimiser, gates or the method's memory differ."""
        if not self.processes.several:
            return
        layers = self._layers
        lines = "\n".join(f"{name}: {layer.head_ranks}" for name, layer in layers.items())
        advice = _SAME_STEP if step else _SAME_START
        require_same_text(self.processes, lines, f"ranks after step {step}", advice)
        tensors = dict(_trained(layers.model, self._optimizer))
        if layers.gates is not None:
            tensors["gates"] = layers.gates.values
        tensors |= {f"{name} of the method's state": value for name, value in state.items()}
        require_same_tensors(self.processes, tensors, f"adapter after step {step}", advice)


def _trained(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, Tensor]]:
    """Every parameter that the optimiser holds whole in each process, and its state."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for index, parameter in enumerate(parameters):
        if hasattr(parameter, "placements"):  # sharded: each process has its own part
            continue
        name = names.get(id(parameter), f"parameter {index}")
        yield name, parameter
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                yield f"{key} of {name}", value


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{tuple(value.shape)} {value.dtype}"
    return repr(value) if isinstance(value, str | int | float | bool | None) else type(value).__name__
