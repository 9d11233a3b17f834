"""Notices that an optimiser's state was loaded, also for optimisers that run no hooks then (bitsandbytes)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class LoadHook:
    """Calls ``after_load`` after each ``optimizer.load_state_dict``.

    A class that overrides ``load_state_dict`` may not run PyTorch's hooks. So its method is wrapped on this one object
    too; ``after_load`` may then be called twice.

    Args:
        optimizer: the optimiser.
        after_load: called without arguments; a second call for one load must do nothing.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, after_load: Callable[[], None]) -> None:
        self._optimizer = optimizer
        self._handle = optimizer.register_load_state_dict_post_hook(lambda _: after_load())
        load = optimizer.load_state_dict

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            result = load(*args, **kwargs)
            after_load()
            return result

        self._own = wrapped if type(optimizer).load_state_dict is not torch.optim.Optimizer.load_state_dict else None
        if self._own is not None:
            vars(optimizer)["load_state_dict"] = self._own

    def remove(self) -> None:
        """Removes the hook. The optimiser loads as before."""
        self._handle.remove()
        if self._own is not None and vars(self._optimizer).get("load_state_dict") is self._own:
            del vars(self._optimizer)["load_state_dict"]
