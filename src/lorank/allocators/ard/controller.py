"""Drives ARD-LoRA's λ so that the ranks end at a budget.

The soft use of a budget is u = max over its constraints of Σ_g cost_g · r0·α_g / limit: 1 is the budget. The target
falls from the use at the start to 1, cubically, as AdaLoRA's budget does, and stays there:

    target(t) = 1 + (u_0 − 1) (1 − t / (reach · T))³
    e = u / target − 1          ln λ ← ln λ + gain · (e + damping · Δe)

Where the ranks are above the target λ grows, below it shrinks; the second term looks at where the error is heading, so
that λ is taken back before the target is met. λ stays within 10⁻⁶ to 10⁶ of what it began with. All of it is
bookkeeping on numbers, without a graph. The last resize rounds to the budget exactly; this keeps it from cutting much.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lorank.allocators.base import State
from lorank.allocators.resolved_budget import ResolvedBudget

LAMBDA_RANGE = 1e6
DAMPING = 50.0


def target_use(step: int, total_steps: int, first: Tensor, reach: float) -> Tensor:
    """What the soft use of the budget should be after ``step`` steps.

    Args:
        first: the use at the start.
        reach: the part of the run, in (0, 1], after which it is 1.
    """
    left = max(0.0, 1 - step / (reach * total_steps))
    return 1 + (first - 1) * left**3


def start_control(limits: ResolvedBudget, owners: list[str], effective: Tensor) -> State:
    """The controller's memory.

    Args:
        owners: of every group, its module.
        effective: r0·α of every group, (G,).
    """
    costs = [[c.costs[name] for name in owners] for c in limits.constraints]
    state = {
        "budget.costs": torch.tensor(costs, dtype=effective.dtype, device=effective.device),  # (C, G)
        "budget.limits": torch.tensor(
            [c.limit for c in limits.constraints], dtype=effective.dtype, device=effective.device
        ),  # (C,)
    }
    return {**state, "budget.first": soft_use(state, effective), "budget.error": effective.new_zeros(())}


def soft_use(state: State, effective: Tensor) -> Tensor:
    """u, a scalar, from r0·α of every group, (G,)."""
    return ((state["budget.costs"] @ effective) / state["budget.limits"]).max()


def update_lambda_(state: State, effective: Tensor, l1: float, gain: float, target: Tensor) -> None:
    """One update of λ, ``state["lambda"]``, in place. No number leaves the device."""
    error = soft_use(state, effective) / target - 1
    change = gain * (error + DAMPING * (error - state["budget.error"]))
    state["budget.error"] = error
    state["lambda"].mul_(change.clamp(-1, 1).exp()).clamp_(l1 / LAMBDA_RANGE, l1 * LAMBDA_RANGE)
