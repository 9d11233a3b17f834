"""FSDP2: the base model is sharded over the processes, and each process has the complete adapter.

Changing ranks needs the complete adapter in each process; it is small. ``fully_shard`` neither shards the parameters
that it is told to ignore, nor averages their gradients. So the gradients are averaged here, at the end of each backward
pass, before the loop clips them.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lorank.errors import LorankError
from lorank.lora import AdapterLayers
from lorank.training.parallel.backend import Backend
from lorank.training.parallel.process_group import ProcessGroup
from lorank.training.run_state import RunState

Model = TypeVar("Model", bound=nn.Module)

SHARD_BASE_ADVICE = (
    "For FSDP2 shard the base model only: model = lorank.shard_base_(model), or fully_shard(…, ignored_params=the "
    "adapter's parameters); with accelerate and the Trainer set the environment variable "
    "FSDP_IGNORED_MODULES='.*lora_.*'"
)


class FsdpBackend(Backend):
    """The backend for FSDP2 over the base model."""

    lockstep = True

    @classmethod
    def supports(cls, layers: AdapterLayers, model: nn.Module, optimizer: Any) -> bool:
        return ProcessGroup.of(layers).several and is_sharded(model)

    def on_start(self, run: RunState) -> None:
        average_gradients_(run.trained_model, ProcessGroup.of(run.layers))


def shard_base_(model: Model, **options: Any) -> Model:
    """Shards the frozen parameters in place, with PyTorch's ``fully_shard`` on each block and on the whole model.

        model = lorank.shard_base_(get_peft_model(base, config))
        optimizer = AdamW(p for p in model.parameters() if p.requires_grad)
        ranks = lorank.attach(model, optimizer, …)

    Args:
        model: a model with an adapter. Parameters that require a gradient are not sharded.
        options: arguments of ``torch.distributed.fsdp.fully_shard``: ``mesh``, ``mp_policy``, ``offload_policy``, …

    Returns:
        The same object. It is unchanged without a process group, or with one process only.

    Raises:
        LorankError: the model is sharded already, or no parameter requires a gradient.
    """
    ignored = {parameter for parameter in model.parameters() if parameter.requires_grad}
    if not ignored:
        raise LorankError("shard_base_: no parameter requires a gradient. Add an adapter to the model first")
    processes = ProcessGroup.current(next(iter(ignored)).device)
    if not processes.several:
        return model
    from torch.distributed.fsdp import fully_shard

    if is_sharded(model):
        raise LorankError("shard_base_: the model is sharded already. Call shard_base_ only once")
    for block in _blocks(model):
        fully_shard(block, ignored_params=ignored, **options)
    fully_shard(model, ignored_params=ignored, **options)
    average_gradients_(model, processes)
    return model


def _blocks(module: nn.Module) -> list[nn.Module]:
    """The elements of the outermost ``nn.ModuleList``s: the blocks of a transformer."""
    if isinstance(module, nn.ModuleList):
        return [block for block in module if next(block.parameters(), None) is not None]
    return [block for child in module.children() for block in _blocks(child)]


def is_sharded(model: nn.Module) -> bool:
    """Whether ``fully_shard`` has sharded parts of the model, so that a forward pass needs all processes at once."""
    return bool(_groups(model))


def _groups(model: nn.Module) -> list[Any]:
    """The parameter groups of FSDP2 in the model."""
    if not dist.is_available():
        return []
    from torch.distributed.fsdp import FSDPModule

    return [
        group
        for module in model.modules()
        if isinstance(module, FSDPModule)
        for group in module._get_fsdp_state()._fsdp_param_groups
    ]


def average_gradients_(model: nn.Module, processes: ProcessGroup) -> None:
    """Averages the gradients of trained, unsharded parameters at the end of each backward pass from now on.

    Nothing is averaged in a pass that the loop runs without synchronisation
    (``model.set_requires_gradient_sync(False)``, accelerate's ``no_sync``). If some processes did not use a parameter,
    its gradient counts as zero there, as in DDP.

    Args:
        model: a model sharded by ``fully_shard``. A second call for it does nothing. The averaging does not end with a
            run, because training may continue after it.
        processes: the processes over which gradients are averaged.
    """
    if model not in _AVERAGED:
        _AVERAGED.add(model)
        _Averaging(model, processes)


_AVERAGED: weakref.WeakSet[nn.Module] = weakref.WeakSet()


class _Averaging:
    def __init__(self, model: nn.Module, processes: ProcessGroup) -> None:
        self._processes = processes
        self._groups = _groups(model)
        self._parameters = [
            parameter
            for parameter in model.parameters()
            if parameter.requires_grad
            and not hasattr(parameter, "placements")
            # transformers itself averages these gradients (of models that are sharded while they are loaded)
            and not getattr(parameter, "_replicated_grad_hook_registered", False)
        ]
        self._backward_pass = -1
        for parameter in self._parameters:
            parameter.register_post_accumulate_grad_hook(self._on_gradient)  # type: ignore[no-untyped-call]  # untyped in torch

    def _on_gradient(self, _: Tensor) -> None:
        """Schedules the averaging for the end of a backward pass, at the first gradient of the pass."""
        current = torch._C._current_graph_task_id()
        if current != self._backward_pass:  # a flag would stay set after a pass that failed
            self._backward_pass = current
            torch.autograd.Variable._execution_engine.queue_callback(self._average)

    @torch.no_grad()
    def _average(self) -> None:
        if all(group.reduce_grads for group in self._groups):
            kinds = {(parameter.dtype, parameter.device) for parameter in self._parameters}
            for kind in sorted(kinds, key=str):
                average_(self._processes, [p for p in self._parameters if (p.dtype, p.device) == kind])


def average_(processes: ProcessGroup, parameters: Sequence[nn.Parameter]) -> None:
    """Averages the gradients of parameters of one dtype in one exchange. A gradient that no process has stays None."""
    used = [parameter.grad is not None for parameter in parameters]
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flags = torch.tensor(used, dtype=grads[0].dtype, device=grads[0].device)  # (parameters,)
    flat = processes.mean_(torch.cat([grad.reshape(-1) for grad in grads] + [flags]))
    *means, flags = torch.split(flat, [grad.numel() for grad in grads] + [len(used)])
    for parameter, mean, grad, is_used in zip(parameters, means, grads, flags.tolist(), strict=True):
        if is_used:
            grad.copy_(mean.view_as(grad))
            parameter.grad = grad
