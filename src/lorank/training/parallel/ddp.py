"""Rebuilds the reducer of DistributedDataParallel after a resize, in place.

The reducer of a DDP module has buckets of the old shapes, and hooks on the old gradient nodes. After a resize, these
hooks are never called again. Gradients are no longer averaged, and the weights of the processes **silently** diverge.
The training loop (also the Trainer's) holds the DDP object, so the object stays and gets a new reducer.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle

from lorank.errors import LorankError
from lorank.lora import AdapterLayers
from lorank.training.live_hook import LiveHook
from lorank.training.parallel.backend import Backend
from lorank.training.parallel.process_group import ProcessGroup
from lorank.training.run_state import RunState


class DdpBackend(Backend):
    """The backend for DistributedDataParallel. The DDP module is found at the start, or in its first forward pass."""

    def __init__(self, layers: AdapterLayers, model: nn.Module, optimizer: Any) -> None:
        super().__init__(layers, model, optimizer)
        self._ddp: weakref.ref[DistributedDataParallel] | None = None
        self._search_hook: RemovableHandle | None = None

    @classmethod
    def supports(cls, layers: AdapterLayers, model: nn.Module, optimizer: Any) -> bool:
        # DDP needs a process group, and has a reducer also where that is of one process (torchrun on one GPU).
        return ProcessGroup.of(layers).several or (dist.is_available() and dist.is_initialized())

    @classmethod
    def inner(cls, model: nn.Module) -> nn.Module:
        ddp = _ddp_of(model)
        return model if ddp is None else ddp.module

    def on_start(self, run: RunState) -> None:
        ddp = _ddp_of(run.model)
        if ddp is not None:
            self._use_ddp(ddp)
        else:
            # A model has no reference to the DDP module around it. A forward pass of the DDP module reveals it.
            self._search_hook = run.trained_model.register_forward_pre_hook(LiveHook(self._find_ddp))

    def after_resize(self, run: RunState) -> None:
        """Rebuilds the reducer, or leaves this to the first forward pass if the DDP module is not known yet."""
        ddp = self._ddp() if self._ddp is not None else None
        if ddp is not None:
            rebuild_(ddp)

    def after_restore(self, run: RunState) -> None:
        self.after_resize(run)  # the weights were replaced, so the reducer's hooks are on gradient nodes of before

    def on_end(self, run: RunState) -> None:
        self._remove_search_hook()

    def _remove_search_hook(self) -> None:
        if self._search_hook is not None:
            self._search_hook.remove()
            self._search_hook = None

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # untyped in torch
    def _find_ddp(self, module: nn.Module, arguments: Any) -> None:
        active = DistributedDataParallel._get_active_ddp_module()  # type: ignore[no-untyped-call]  # untyped in torch
        if active is not None and _contains(active, module):
            self._remove_search_hook()
            self._use_ddp(active)

    def _use_ddp(self, ddp: DistributedDataParallel) -> None:
        if ddp.mixed_precision is not None or ddp._use_python_reducer or ddp._delay_all_reduce_params:
            raise LorankError(
                "DistributedDataParallel(mixed_precision=…), (delay_all_reduce_named_params=…) and torch.compile's "
                "python_reducer keep copies of parameters, which lorank cannot resize: leave these options out (mixed "
                "precision by torch.autocast works)"
            )
        self._ddp = weakref.ref(ddp)
        rebuild_(ddp)  # ranks may have changed since the DDP module was made


def rebuild_(ddp: DistributedDataParallel) -> None:
    """Makes a new reducer for parameters whose shapes have changed. Call it outside of a backward pass.

    There is no communication. Communication hooks, a static graph and the other settings of the module are kept.
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
    """The DDP module ``outer``, or the one that ``torch.compile`` has wrapped; None if there is none."""
    inner = getattr(outer, "_orig_mod", outer)
    return inner if isinstance(inner, DistributedDataParallel) else None


def _contains(ddp: DistributedDataParallel, module: nn.Module) -> bool:
    return any(inner is module for inner in ddp.modules())
