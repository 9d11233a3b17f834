"""DistributedDataParallel after a resize: its reducer is made anew, in place.

The reducer of a DDP module holds buckets of the old shapes and hooks on the old gradient nodes. After a resize those
hooks never fire again, gradients are no longer averaged, and the processes **silently** train apart. The loop (the
Trainer's too) holds the DDP object, so that one stays and gets a new reducer.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle

from lorank.errors import LorankError
from lorank.lora import AdapterLayers
from lorank.training.parallel.backend import Backend
from lorank.training.parallel.process_group import ProcessGroup
from lorank.training.run_state import RunState


class DdpBackend(Backend):
    """DistributedDataParallel. The DDP module is found at once, or when a forward pass first goes through it."""

    def __init__(self, layers: AdapterLayers, model: nn.Module, optimizer: Any) -> None:
        super().__init__(layers, model, optimizer)
        self._ddp: weakref.ref[DistributedDataParallel] | None = None
        self._handle: RemovableHandle | None = None

    @classmethod
    def serves(cls, layers: AdapterLayers, model: nn.Module, optimizer: Any) -> bool:
        return ProcessGroup.of(layers).several

    @classmethod
    def inner(cls, model: nn.Module) -> nn.Module:
        ddp = _ddp_of(model)
        return model if ddp is None else ddp.module

    def on_start(self, run: RunState) -> None:
        ddp = _ddp_of(run.model)
        if ddp is not None:
            self._meet(ddp)
        else:
            # Nothing leads from a model to the DDP module around it, but a forward pass goes through both.
            self._handle = run.layers.model.register_forward_pre_hook(self._look)

    def after_resize(self, run: RunState) -> None:
        """Where no DDP module has run yet, its reducer is made anew when it first does."""
        ddp = self._ddp() if self._ddp is not None else None
        if ddp is not None:
            rebuild_(ddp)

    def on_end(self, run: RunState) -> None:
        self._stop_looking()

    def _stop_looking(self) -> None:
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # untyped in torch
    def _look(self, module: nn.Module, arguments: Any) -> None:
        active = DistributedDataParallel._get_active_ddp_module()  # type: ignore[no-untyped-call]  # untyped in torch
        if active is not None and _holds(active, module):
            self._stop_looking()
            self._meet(active)

    def _meet(self, ddp: DistributedDataParallel) -> None:
        if ddp.mixed_precision is not None or ddp._use_python_reducer or ddp._delay_all_reduce_params:
            raise LorankError(
                "DistributedDataParallel(mixed_precision=…), (delay_all_reduce_named_params=…) and torch.compile's "
                "python_reducer keep parameters of their own, which cannot follow a change of rank: leave them out "
                "(mixed precision by torch.autocast works)"
            )
        self._ddp = weakref.ref(ddp)
        rebuild_(ddp)  # ranks may have moved between its making and now


def rebuild_(ddp: DistributedDataParallel) -> None:
    """A new reducer for parameters whose shapes have changed, outside of a backward pass. No communication.

    Communication hooks, a static graph and the other settings of the module stay.
    """
    ddp.reducer._remove_autograd_hooks()
    ddp.logger = None
    parameters, sparse = ddp._build_params_for_reducer()  # type: ignore[no-untyped-call]  # untyped in torch
    names = ddp._build_debug_param_to_name_mapping(parameters)  # type: ignore[no-untyped-call]  # untyped in torch
    static, ddp.static_graph = ddp.static_graph, False
    ddp._ddp_init_helper(parameters, sparse, names, static)  # type: ignore[no-untyped-call]  # untyped in torch
    ddp._has_rebuilt_buckets = False
    if static:
        ddp._set_static_graph()  # type: ignore[no-untyped-call]  # untyped in torch
    for hook, state in ddp._comm_hooks:
        torch.distributed._register_comm_hook(ddp.reducer, state, hook)  # type: ignore[attr-defined]  # untyped in torch


def _ddp_of(outer: nn.Module) -> DistributedDataParallel | None:
    """The DDP module that this is, or that ``torch.compile`` was given."""
    inner = getattr(outer, "_orig_mod", outer)
    return inner if isinstance(inner, DistributedDataParallel) else None


def _holds(ddp: DistributedDataParallel, module: nn.Module) -> bool:
    return any(inner is module for inner in ddp.modules())
