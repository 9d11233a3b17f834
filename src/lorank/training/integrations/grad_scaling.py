"""fp16 training multiplies its loss so that small gradients survive, and skips steps whose gradients have overflowed.

``torch.amp.GradScaler`` divides the gradients of the optimiser's parameters by its scale before they are used, with two
exceptions that matter here. Learned gates are in no optimiser, so theirs stay scaled. And fused optimisers are handed
the scale and whether something overflowed, and see to both themselves: what looks like a step may be none.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from lorank.lora import LearnedGates
from lorank.training.integrations.base import Integration, StepSkipped
from lorank.training.run_state import RunState

logger = logging.getLogger("lorank")


class GradScaling(Integration):
    """Gradients have their true size when a method looks at them, and a step that the scaler skips is no step.

    Args:
        optimizer: what the user made, which may be accelerate's wrapper: it knows its scaler.
        scaler: the loop's gradient scaler; None: the wrapper's, or none.
    """

    def __init__(self, optimizer: Any, scaler: Any) -> None:
        while scaler is None and optimizer is not None:
            scaler = getattr(optimizer, "scaler", None)
            optimizer = getattr(optimizer, "optimizer", None)
        self._scaler = scaler if scaler is not None and scaler.is_enabled() else None
        self._warned = False
        self._forwards = 0  # since the last step
        self._handle: RemovableHandle | None = None

    def on_start(self, run: RunState) -> None:
        self._layers = run.layers
        self._handle = run.layers.model.register_forward_pre_hook(self._before_forward)

    def before_step(self, run: RunState) -> None:
        """Divides out the scale wherever it is still in a gradient.

        Raises:
            StepSkipped: a gradient has overflowed, so that the optimiser will leave the weights as they are.
        """
        optimizer = run.optimizer
        found_inf, scale = getattr(optimizer, "found_inf", None), getattr(optimizer, "grad_scale", None)
        if found_inf is not None and bool(found_inf):
            raise StepSkipped
        if scale is not None:  # a fused optimiser would divide, after methods have looked
            grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
            for grad in grads:
                grad.mul_(scale.double().reciprocal().float().to(grad.device))
            setattr(optimizer, "grad_scale", None)  # noqa: B010  # the scaler's own attribute, unknown to type checkers
        if self._scaler is not None and run.layers.gates is not None:
            run.layers.gates.grad.div_(self._scaler.get_scale())

    def after_step(self, run: RunState) -> None:
        self._forwards = 0

    def on_end(self, run: RunState) -> None:
        if self._handle is not None:
            self._handle.remove()

    def _before_forward(self, model: nn.Module, _: Any) -> None:
        """Where a loop has thrown its gradients away without a step, those of the gates go too."""
        gates = self._layers.gates
        if gates is None or not (model.training and torch.is_grad_enabled()):
            return
        if any(layer.pool is not None for layer in self._layers.values()):
            return  # DeepSpeed keeps gradients to itself, and throws none away
        device = gates.values.device.type
        fp16 = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.float16
        if fp16 and self._scaler is None and not self._warned:
            self._warned = True
            logger.warning(
                "the model trains in float16 autocast and lorank knows of no gradient scaler. If there is one, its "
                "scale stays in the gradients of the gates that this method learns: attach(…, grad_scaler=scaler)"
            )
        self._forwards += 1
        if self._forwards > 1 and self._thrown_away(gates):
            gates.clear_grad()

    def _thrown_away(self, gates: LearnedGates) -> bool:
        """Whether the gradients of A and B have been set to None, or to zero, since they were computed."""
        grads = [p.grad for layer in self._layers.values() for p in (layer.A, layer.B) if p.grad is not None]
        if any(bool(grad.any()) for grad in grads):
            return False
        # Beneath gates that are all zero (AdaLoRA begins so) a gradient is zero by itself.
        return not grads or bool(gates.values.any()) or not bool(gates.grad.isfinite().all())
