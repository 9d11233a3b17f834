"""The hooks around an optimiser's step, also for a step that makes its own gradients: ``optimizer.step(closure)``.

PyTorch calls a step pre-hook before the optimiser calls the closure, so the gradients of that moment are old ones. The
closure is therefore wrapped:

    step(closure):  begin → [closure: forward, backward] → before, with complete gradients → update → after
    step():         begin → before → update → after
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from lorank.errors import OptimizerStateError

# The function by which PyTorch calls an optimiser's step between its hooks. All optimisers share its code object.
_STEP_WRAPPER = torch.optim.Optimizer.profile_hook_step(lambda: None).__code__

_REMEDY = (
    "Compute the gradients before the step: optimizer.zero_grad(), loss.backward(), optimizer.step(). If {name} is "
    "wrapped around another optimiser, train with that one"
)


class StepHooks:
    """Calls three functions in each step of an optimiser.

    Args:
        optimizer: the torch optimiser whose ``step`` the training loop calls.
        begin: called first, before a closure computes anything.
        before: called when the gradients are complete and the weights have not moved. An error stops the step.
        after: called after the step.
        strict: whether to refuse a step that does not use the gradients of exactly one call of its closure. Else
            ``before`` is called after the first call of the closure.

    Raises:
        OptimizerStateError: in a step, if ``strict``: the optimiser calls its closure not at all or more than once, or
            moves the weights before it calls it. In the first step with a closure, the weights are then restored.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        begin: Callable[[], None],
        before: Callable[[], None],
        after: Callable[[], None],
        *,
        strict: bool,
    ) -> None:
        self._optimizer, self._begin, self._before, self._after = optimizer, begin, before, after
        self._strict = strict
        self._may_nest = sum("step" in vars(kind) for kind in type(optimizer).__mro__) > 2  # own, inherited, abstract
        self._closure_calls: int | None = None  # in the present step; None: the step has no closure
        self._checked = False  # whether the optimiser has done a step with a closure
        self._weights: list[tuple[Tensor, Tensor]] = []  # the weights and their copies, during the first such step
        self._handles: tuple[RemovableHandle, ...] = ()

    def register(self) -> None:
        """Registers the hooks."""
        self._handles = (
            self._optimizer.register_step_pre_hook(self._pre_hook),
            self._optimizer.register_step_post_hook(self._post_hook),
        )

    def remove(self) -> None:
        """Removes the hooks."""
        for handle in self._handles:
            handle.remove()

    def _pre_hook(self, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
        if self._is_nested():
            return None
        self._closure_calls, self._weights = None, []
        self._begin()
        closure = args[1] if len(args) > 1 else kwargs.get("closure")  # args[0] is the optimiser
        if not callable(closure):
            self._before()
            return None
        self._closure_calls = 0
        if self._strict and not self._checked:
            parameters = [p for group in self._optimizer.param_groups for p in group["params"]]
            # A comparison of sharded weights would need all processes.
            self._weights = [(p, p.detach().clone()) for p in parameters if not hasattr(p, "placements")]
        wrapped = self._wrap(closure)
        return ((args[0], wrapped, *args[2:]), kwargs) if len(args) > 1 else (args, {**kwargs, "closure": wrapped})

    def _wrap(self, closure: Callable[..., Any]) -> Callable[..., Any]:
        grad_mode = torch.is_grad_enabled()  # the closure runs in a mode of the optimiser's choice

        def closure_then_before(*args: Any, **kwargs: Any) -> Any:
            if self._closure_calls and not self._strict:
                return closure(*args, **kwargs)
            if self._closure_calls:
                raise self._refusal("calls its closure more than once in a step, so its gradients are uncertain")
            self._closure_calls = 1
            if any(not torch.equal(parameter, copy) for parameter, copy in self._weights):
                raise self._refusal("moves the weights before it calls its closure, which then has other gradients")
            loss = closure(*args, **kwargs)
            with torch.set_grad_enabled(grad_mode):
                self._before()
            return loss

        return closure_then_before

    def _post_hook(self, *_: Any) -> None:
        if self._is_nested():
            return
        if self._closure_calls == 0 and self._strict:
            raise self._refusal("does not call its closure, so the step has used old gradients")
        self._checked = self._checked or self._closure_calls is not None
        self._weights = []
        self._after()

    def _is_nested(self) -> bool:
        """Whether this hook is called in a step inside a step: by ``super().step()`` of an optimiser's own step."""
        if not self._may_nest:
            return False
        depth, frame = 0, sys._getframe(1)
        while frame is not None:
            depth += frame.f_code is _STEP_WRAPPER and frame.f_locals.get("self") is self._optimizer
            frame = frame.f_back  # type: ignore[assignment]  # None at the outermost frame
        return depth > 1

    def _refusal(self, fault: str) -> OptimizerStateError:
        name = type(self._optimizer).__name__
        state = "Resume from the last checkpoint"
        if self._weights:
            with torch.no_grad():
                for parameter, copy in self._weights:
                    parameter.copy_(copy)
            state = "The weights are as before the step"
        self._weights = []
        return OptimizerStateError(f"{name} {fault}. {state}. {_REMEDY.format(name=name)}")
