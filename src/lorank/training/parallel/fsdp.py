"""FSDP2: the base model is sharded over the processes, the adapter is whole in each of them.

Ranks can only move where a process has the whole adapter, which is small. ``fully_shard`` leaves parameters that it is
told to ignore as they are, and leaves their gradients to whoever told it: here they are averaged at the end of each
backward pass, before a loop clips them.
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

HOW = (
    "For FSDP2 shard the base model alone: model = lorank.shard_base_(model), or fully_shard(…, ignored_params=the "
    "adapter's); with accelerate and the Trainer set the environment variable FSDP_IGNORED_MODULES='.*lora_.*'"
)


class FsdpBackend(Backend):
    """FSDP2 over the base model."""

    lockstep = True

    @classmethod
    def serves(cls, layers: AdapterLayers, model: nn.Module, optimizer: Any) -> bool:
        return ProcessGroup.of(layers).several and is_sharded(layers.model)

    def on_start(self, run: RunState) -> None:
        average_gradients_(run.layers.model, ProcessGroup.of(run.layers))


def shard_base_(model: Model, **options: Any) -> Model:
    """Shards everything that is not trained, in place: PyTorch's ``fully_shard`` on each block and on the whole.

        model = lorank.shard_base_(get_peft_model(base, config))
        optimizer = AdamW(p for p in model.parameters() if p.requires_grad)
        ranks = lorank.attach(model, optimizer, …)

    Args:
        model: a model with an adapter; parameters that require a gradient stay whole in every process.
        options: of ``torch.distributed.fsdp.fully_shard``: ``mesh``, ``mp_policy``, ``offload_policy``, …

    Returns:
        The same object. Without a process group, or where there is one process only, it is left as it is.

    Raises:
        LorankError: it is sharded already, or nothing of it is trained.
    """
    ignored = {parameter for parameter in model.parameters() if parameter.requires_grad}
    if not ignored:
        raise LorankError("shard_base_: no parameter requires a gradient. Give the model an adapter first")
    processes = ProcessGroup.now(next(iter(ignored)).device)
    if not processes.several:
        return model
    from torch.distributed.fsdp import fully_shard

    if is_sharded(model):
        raise LorankError("shard_base_: the model is sharded already")
    for block in _blocks(model):
        fully_shard(block, ignored_params=ignored, **options)
    fully_shard(model, ignored_params=ignored, **options)
    average_gradients_(model, processes)
    return model


def _blocks(module: nn.Module) -> list[nn.Module]:
    """The elements of the outermost lists of modules: a transformer's blocks."""
    if isinstance(module, nn.ModuleList):
        return [block for block in module if next(block.parameters(), None) is not None]
    return [block for child in module.children() for block in _blocks(child)]


def is_sharded(model: nn.Module) -> bool:
    """Whether parts of it are sharded by ``fully_shard``, so that a forward pass needs all processes at once."""
    return bool(_groups(model))


def _groups(model: nn.Module) -> list[Any]:
    """FSDP2's groups of parameters."""
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
    """From now on, gradients of what is trained and not sharded are averaged at the end of each backward pass.

    A pass that the loop runs without synchronisation (``model.set_requires_gradient_sync(False)``, accelerate's
    ``no_sync``) is left alone. A parameter that some processes did not use counts as zero there, as in DDP.

    Args:
        model: sharded by ``fully_shard``; once is enough, and does not end, since training may go on after a run.
        processes: over which.
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
            # transformers averages those that it knows of itself (models sharded while they are loaded)
            and not getattr(parameter, "_replicated_grad_hook_registered", False)
        ]
        self._pass = -1
        for parameter in self._parameters:
            parameter.register_post_accumulate_grad_hook(self._seen)  # type: ignore[no-untyped-call]  # untyped in torch

    def _seen(self, _: Tensor) -> None:
        """The first gradient of a backward pass asks for a turn at its end."""
        current = torch._C._current_graph_task_id()
        if current != self._pass:  # not a flag, which a pass that failed would leave behind
            self._pass = current
            torch.autograd.Variable._execution_engine.queue_callback(self._average)

    @torch.no_grad()
    def _average(self) -> None:
        if all(group.reduce_grads for group in self._groups):
            kinds = {(parameter.dtype, parameter.device) for parameter in self._parameters}
            for kind in sorted(kinds, key=str):
                average_(self._processes, [p for p in self._parameters if (p.dtype, p.device) == kind])


def average_(processes: ProcessGroup, parameters: Sequence[nn.Parameter]) -> None:
    """Averages the gradients of parameters of one dtype, in one exchange. Those that no process has stay None."""
    used = [parameter.grad is not None for parameter in parameters]
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flags = torch.tensor(used, dtype=grads[0].dtype, device=grads[0].device)  # (parameters,)
    flat = processes.mean_(torch.cat([grad.reshape(-1) for grad in grads] + [flags]))
    *means, flags = torch.split(flat, [grad.numel() for grad in grads] + [len(used)])
    for parameter, mean, grad, anywhere in zip(parameters, means, grads, flags.tolist(), strict=True):
        if anywhere:
            grad.copy_(mean.view_as(grad))
            parameter.grad = grad
