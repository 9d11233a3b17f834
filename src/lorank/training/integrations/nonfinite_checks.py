"""Stops a run at a NaN or infinite gradient, weight or score.

Gradients are checked before the step, weights before scoring, and scores before the decision is carried out. A NaN in a
moving average, a gate or Adam's moments stays there forever, and makes every later decision wrong. So gradients are
checked before the method or the optimiser uses them. The check is one reduction over all gradients, and reads one value
back from the device.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from lorank.allocators import Allocation
from lorank.errors import NonFiniteError
from lorank.lora import AdapterLayers
from lorank.training.integrations.base import Integration
from lorank.training.run_state import RunState

REMEDY = (
    "Look at this step's batch and loss (a sample without labels? a division by zero?); where training diverges, a "
    "lower learning rate, a longer warm-up or clipped gradients help; where float16 overflows, bfloat16 or a gradient "
    "scaler"
)


class NonfiniteChecks(Integration):
    """Checks gradients before every step of a method that changes ranks, and scores before every decision."""

    def before_step(self, run: RunState) -> None:
        if run.allocator.moves_ranks and not run.finished:
            require_finite_gradients(run.layers, run.optimizer, run.step + 1)

    def on_decision(self, run: RunState, allocation: Allocation | None) -> None:
        if allocation is not None:
            require_finite_scores(allocation.scores, run.step, type(run.allocator).__name__)


def require_finite_gradients(layers: AdapterLayers, optimizer: torch.optim.Optimizer, step: int) -> None:
    """Checks the gradients of all trained parameters and learned gates. Call it before the optimiser's step.

    Args:
        layers: the LoRA layers.
        optimizer: the optimiser that holds the trained parameters.
        step: the number of the next step, for the error message.

    Raises:
        NonFiniteError: a gradient holds NaN or infinity. Nothing has changed.
    """
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if _is_dense(p.grad)]
    if layers.gates is not None and layers.gates.grad.numel():
        gradients.append(layers.gates.grad)
    if not gradients:
        return
    largest = torch.nn.utils.get_total_norm(
        gradients, norm_type=math.inf
    )  # NaN if there is one; one squared may overflow
    if bool(largest.isfinite()):
        return
    affected = [(name, kind) for name, gradient in _named_gradients(layers) if (kind := _nonfinite_kind(gradient))]
    where = (
        f"of {affected[0][0]} holds {affected[0][1]}"
        if affected
        else "of a parameter outside the adapter is not finite"
    )
    more = f", and so do those of {len(affected) - 1} more" if len(affected) > 1 else ""
    raise NonFiniteError(
        f"step {step}: the gradient {where}{more}. The step was not made: ranks, gates, weights and the optimiser are "
        f"those after step {step - 1}. {REMEDY}. To leave this batch out, zero the gradients and go on; to go back, "
        "resume from the last checkpoint"
    )


def require_finite_scores(scores: Mapping[str, Tensor] | None, step: int, method: str) -> None:
    """Checks the scores of a decision. Call it before the decision is carried out.

    Raises:
        NonFiniteError: a score is NaN or infinite. No rank has changed.
    """
    for name, values in (scores or {}).items():
        if kind := _nonfinite_kind(values):
            raise NonFiniteError(
                f"step {step}: {method}'s scores of {name} hold {kind}: its weights or gates are not finite, or their "
                f"products overflow. No rank was moved. {REMEDY}. Resume from the last checkpoint"
            )


def require_finite_weights(layers: AdapterLayers, step: int) -> None:
    """Checks the adapter's weights. Call it before ranks are scored.

    The loss does not always show NaN weights: PyTorch's attention on some CPUs returns zeros for NaN queries.

    Raises:
        NonFiniteError: A or B of a module holds NaN or infinity, e.g. after a step whose gradients were not checked.
    """
    weights = [weight.detach() for layer in layers.values() for weight in (layer.A, layer.B) if weight.numel()]
    if not weights or bool(torch.nn.utils.get_total_norm(weights, norm_type=math.inf).isfinite()):
        return
    names = [name for name, layer in layers.items() if _nonfinite_kind(layer.A) or _nonfinite_kind(layer.B)]
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    raise NonFiniteError(
        f"step {step}: the weights of {', '.join(names[:3])}{more} are not finite. No rank was moved. {REMEDY}. Resume "
        "from the last checkpoint"
    )


def _named_gradients(layers: AdapterLayers) -> Iterator[tuple[str, Tensor]]:
    for name, layer in layers.items():
        for label, parameter in (("lora_A", layer.A), ("lora_B", layer.B)):
            if parameter.grad is not None:
                yield f"{name}.{label}", parameter.grad
    if layers.gates is not None:
        yield "the learned gates", layers.gates.grad


def _nonfinite_kind(values: Tensor) -> str | None:
    if bool(values.isnan().any()):
        return "NaN"
    return "infinity" if bool(values.isinf().any()) else None


def _is_dense(gradient: Tensor | None) -> bool:
    """Whether a gradient is checked. Sharded and sparse gradients belong to parameters that no method reads."""
    return type(gradient) is Tensor and gradient.layout == torch.strided and gradient.numel() > 0
