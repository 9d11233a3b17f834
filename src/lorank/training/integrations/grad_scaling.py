"""Support for the gradient scalers of float16 training.

float16 training scales the loss, so that small gradients do not become zero. It skips steps whose gradients overflow.
``torch.amp.GradScaler`` divides the gradients of the optimiser's parameters by the scale before the step. There are two
exceptions. Learned gates are in no optimiser, so their gradients stay scaled, and so do the Gramians of backward passes
(:mod:`lorank.lora.gramians`). Fused optimisers receive the scale and an overflow flag, and apply both themselves, so
their ``step`` may leave the weights unchanged.

What gates and Gramians hold of backward passes is thrown away with the gradients, also where the loop resets these
without a step, as after an overflow.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from lorank.lora import LearnedGates
from lorank.training.integrations.base import Integration, StepSkipped
from lorank.training.live_hook import LiveHook
from lorank.training.run_state import RunState

logger = logging.getLogger("lorank")


class GradScaling(Integration):
    """Unscales gradients before the method reads them, and detects steps that the scaler skips.

    Args:
        optimizer: the user's optimiser. If it is accelerate's wrapper, it provides its scaler.
        scaler: the loop's gradient scaler; None: the wrapper's scaler, if there is one.
    """

    def __init__(self, optimizer: Any, scaler: Any) -> None:
        while scaler is None and optimizer is not None:
            scaler = getattr(optimizer, "scaler", None)
            optimizer = getattr(optimizer, "optimizer", None)
        self._scaler = scaler if scaler is not None and scaler.is_enabled() else None
        self._warned = False
        self._forward_count = 0  # since the last step
        self._handle: RemovableHandle | None = None

    def on_start(self, run: RunState) -> None:
        self._layers = run.layers
        self._handle = run.layers.model.register_forward_pre_hook(LiveHook(self._before_forward))

    def before_step(self, run: RunState) -> None:
        """Divides every gradient that is still scaled by the scale.

        Raises:
            StepSkipped: a gradient has overflowed, so the optimiser will not change the weights.
        """
        optimizer = run.optimizer
        found_inf, scale = getattr(optimizer, "found_inf", None), getattr(optimizer, "grad_scale", None)
        gramians = run.layers.gramians
        if found_inf is not None and bool(found_inf):
            if gramians is not None:
                gramians.clear()
            raise StepSkipped
        if scale is not None:  # a fused optimiser would unscale after the method has read the gradients
            grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
            for grad in grads:
                grad.mul_(scale.double().reciprocal().float().to(grad.device))
            setattr(optimizer, "grad_scale", None)  # noqa: B010  # the scaler's own attribute, unknown to type checkers
        if self._scaler is not None and run.layers.gates is not None:
            run.layers.gates.grad.div_(self._scaler.get_scale())
        if gramians is not None and self._scaler is not None:
            gramians.unscale(self._scaler.get_scale())
        elif gramians is not None and scale is not None:
            gramians.unscale(float(scale))

    def after_step(self, run: RunState) -> None:
        self._forward_count = 0

    def on_end(self, run: RunState) -> None:
        if self._handle is not None:
            self._handle.remove()

    def _before_forward(self, model: nn.Module, _: Any) -> None:
        """Resets the gradients of the gates, and the Gramians, if the loop has reset its gradients without a step."""
        gates, gramians = self._layers.gates, self._layers.gramians
        if gramians is not None and not gramians.collecting:
            gramians = None
        if (gates is None and gramians is None) or not (model.training and torch.is_grad_enabled()):
            return
        if any(layer.pool is not None for layer in self._layers.values()):
            return  # DeepSpeed keeps its own gradients, and never resets them without a step
        device = next(iter(self._layers.values())).A.device.type if gates is None else gates.values.device.type
        fp16 = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.float16
        if fp16 and self._scaler is None and not self._warned:
            self._warned = True
            logger.warning(
                "the model trains in float16 autocast, and lorank was given no gradient scaler. If there is a scaler, "
                "its scale stays in what the method reads of gradients: use attach(…, grad_scaler=scaler)"
            )
        self._forward_count += 1
        if self._forward_count > 1 and self._gradients_were_reset(gates):
            if gates is not None:
                gates.clear_grad()
            if gramians is not None:
                gramians.clear()

    def _gradients_were_reset(self, gates: LearnedGates | None) -> bool:
        """Whether the loop has set the gradients of A and B to None or to zero since they were computed."""
        grads = [p.grad for layer in self._layers.values() for p in (layer.A, layer.B) if p.grad is not None]
        if any(bool(grad.any()) for grad in grads):
            return False
        # If all gates are zero (as at the start of AdaLoRA), the gradients of A and B are zero without a reset.
        return not grads or gates is None or bool(gates.values.any()) or not bool(gates.grad.isfinite().all())
