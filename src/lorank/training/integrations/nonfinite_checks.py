"""NaN and infinity stop a run before they count: in a gradient before the step, in a score before the decision.

A NaN that enters a moving average, a gate or Adam's moments never leaves it, and every later decision rests on it. So
gradients are checked before a method or the optimiser uses them: one reduction over all of them, and one number that is
read back.
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
    """Gradients are looked at before every step of a method that moves ranks, scores before every decision."""

    def before_step(self, run: RunState) -> None:
        if run.allocator.moves_ranks and not run.finished:
            require_finite_gradients(run.layers, run.optimizer, run.step + 1)

    def on_decision(self, run: RunState, allocation: Allocation | None) -> None:
        if allocation is not None:
            require_finite_scores(allocation.scores, run.step, type(run.allocator).__name__)


def require_finite_gradients(layers: AdapterLayers, optimizer: torch.optim.Optimizer, step: int) -> None:
    """Called before the optimiser's step, with gradients as it will see them.

    Args:
        step: the number of the step that is about to be made.

    Raises:
        NonFiniteError: a gradient of a trained parameter or a learned gate holds NaN or infinity. Nothing has changed.
    """
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if _is_plain(p.grad)]
    if layers.gates is not None and layers.gates.grad.numel():
        gradients.append(layers.gates.grad)
    if not gradients:
        return
    largest = torch.nn.utils.get_total_norm(
        gradients, norm_type=math.inf
    )  # NaN if there is one; one squared may overflow
    if bool(largest.isfinite()):
        return
    found = [(name, kind) for name, gradient in _named(layers) if (kind := _trouble(gradient))]
    where = f"of {found[0][0]} holds {found[0][1]}" if found else "of a parameter outside the adapter is not finite"
    more = f", and so do those of {len(found) - 1} more" if len(found) > 1 else ""
    raise NonFiniteError(
        f"step {step}: the gradient {where}{more}. The step was not made: ranks, gates, weights and the optimiser are "
        f"those after step {step - 1}. {REMEDY}. To leave this batch out, zero the gradients and go on; to go back, "
        "resume from the last checkpoint"
    )


def require_finite_scores(scores: Mapping[str, Tensor] | None, step: int, method: str) -> None:
    """Called before a decision is carried out.

    Raises:
        NonFiniteError: a score is not finite. Ranks have not moved.
    """
    for name, values in (scores or {}).items():
        if kind := _trouble(values):
            raise NonFiniteError(
                f"step {step}: {method}'s scores of {name} hold {kind}: its weights or gates are not finite, or their "
                f"products overflow. No rank was moved. {REMEDY}. Resume from the last checkpoint"
            )


def require_finite_weights(layers: AdapterLayers, step: int) -> None:
    """Called before ranks are scored. The loss would not always tell: PyTorch's attention on some CPUs gives zeros for
    queries that are NaN.

    Raises:
        NonFiniteError: A or B of a module holds NaN or infinity, as after a step that nobody watched.
    """
    weights = [weight.detach() for layer in layers.values() for weight in (layer.A, layer.B) if weight.numel()]
    if not weights or bool(torch.nn.utils.get_total_norm(weights, norm_type=math.inf).isfinite()):
        return
    names = [name for name, layer in layers.items() if _trouble(layer.A) or _trouble(layer.B)]
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    raise NonFiniteError(
        f"step {step}: not finite are the weights of {', '.join(names[:3])}{more}. No rank was moved. {REMEDY}. Resume "
        "from the last checkpoint"
    )


def _named(layers: AdapterLayers) -> Iterator[tuple[str, Tensor]]:
    for name, layer in layers.items():
        for what, parameter in (("lora_A", layer.A), ("lora_B", layer.B)):
            if parameter.grad is not None:
                yield f"{name}.{what}", parameter.grad
    if layers.gates is not None:
        yield "the learned gates", layers.gates.grad


def _trouble(values: Tensor) -> str | None:
    if bool(values.isnan().any()):
        return "NaN"
    return "infinity" if bool(values.isinf().any()) else None


def _is_plain(gradient: Tensor | None) -> bool:
    """Those of other kinds (sharded ones, sparse ones) belong to parameters that no method looks at."""
    return type(gradient) is Tensor and gradient.layout == torch.strided and gradient.numel() > 0
