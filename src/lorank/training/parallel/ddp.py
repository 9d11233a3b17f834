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


class Reducers:
    """The DDP module around a model, found when it first runs, and its reducer.

    Args:
        model: what DDP wraps: the object that has the LoRA layers.
        outer: what the user handed in, which may be the DDP module itself, also under ``torch.compile``.
    """

    def __init__(self, model: nn.Module, outer: nn.Module) -> None:
        self._ddp: weakref.ref[DistributedDataParallel] | None = None
        self._handle: RemovableHandle | None = None
        found = ddp_of(outer)
        if found is not None:
            self._meet(found)
        else:
            # Nothing leads from a model to the DDP module around it, but a forward pass goes through both.
            self._handle = model.register_forward_pre_hook(self._look)

    def rebuild(self) -> None:
        """After a resize. Where no DDP module has run yet, its reducer is made anew when it first does."""
        ddp = self._ddp() if self._ddp is not None else None
        if ddp is not None:
            rebuild_(ddp)

    def close(self) -> None:
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # untyped in torch
    def _look(self, module: nn.Module, arguments: Any) -> None:
        active = DistributedDataParallel._get_active_ddp_module()  # type: ignore[no-untyped-call]  # untyped in torch
        if active is not None and _holds(active, module):
            self.close()
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


def ddp_of(outer: nn.Module) -> DistributedDataParallel | None:
    """The DDP module that this is, or that ``torch.compile`` was given."""
    inner = getattr(outer, "_orig_mod", outer)
    return inner if isinstance(inner, DistributedDataParallel) else None


def _holds(ddp: DistributedDataParallel, module: nn.Module) -> bool:
    return any(inner is module for inner in ddp.modules())
