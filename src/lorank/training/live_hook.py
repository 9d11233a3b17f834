"""Forward pre-hooks that belong to one live model, and not to its copies."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn


class LiveHook:
    """A forward pre-hook that can be copied and pickled with its module.

    A hook that is a bound method would take the run along: a deep copy of the model would copy it, and a pickle of the
    model would hold it. The copies of this hook do nothing.

    Args:
        action: called with the module and its positional arguments before each forward pass; None: nothing is done.
    """

    def __init__(self, action: Callable[[nn.Module, Any], None] | None = None) -> None:
        self._action = action

    def __call__(self, module: nn.Module, arguments: Any) -> None:
        if self._action is not None:
            self._action(module, arguments)

    def __deepcopy__(self, memo: object) -> LiveHook:
        return LiveHook()

    def __reduce__(self) -> tuple[Any, ...]:
        return LiveHook, ()
