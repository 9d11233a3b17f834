"""The controller of ARD-LoRA's λ. It adapts λ so that the ranks meet a budget.

The soft use of a budget is u = max over its constraints of Σ_g cost_g · r0·α_g / limit. u = 1 means that the budget is
used up. The target of u falls cubically from its initial value to 1, like AdaLoRA's budget, and then stays at 1:

    target(t) = 1 + (u_0 − 1) (1 − t / (reach · T))³
    e = u / target − 1          ln λ ← ln λ + gain · (e + damping · Δe)

λ grows while the ranks are above the target, and shrinks while they are below it. The damping term uses the change of
the error, so that λ shrinks before the target is reached. λ stays within 10⁻⁶ to 10⁶ times its initial value. No
autograd graph is involved. The last resize rounds to the budget exactly; with this controller it removes few ranks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lorank.allocators.base import State
from lorank.allocators.resolved_budget import ResolvedBudget

LAMBDA_RANGE = 1e6
"""λ stays within its initial value divided and multiplied by this."""
DAMPING = 50.0


def target_use(step: int, total_steps: int, first: Tensor, reach: float) -> Tensor:
    """The target of the budget's soft use after ``step`` steps, ().

    Args:
        first: the soft use at the start, ().
        reach: the fraction of the run, in (0, 1], after which the target is 1.
    """
    left = max(0.0, 1 - step / (reach * total_steps))
    return 1 + (first - 1) * left**3


def start_control(budget: ResolvedBudget, owners: list[str], effective: Tensor) -> State:
    """The controller's initial state.

    Args:
        owners: the module of every group.
        effective: r0·α of every group, (G,).
    """
    costs = [[c.costs[name] for name in owners] for c in budget.constraints]
    state = {
        "budget.costs": torch.tensor(costs, dtype=effective.dtype, device=effective.device),  # (C, G)
        "budget.limits": torch.tensor(
            [c.limit for c in budget.constraints], dtype=effective.dtype, device=effective.device
        ),  # (C,)
    }
    return {**state, "budget.first": soft_use(state, effective), "budget.error": effective.new_zeros(())}


def soft_use(state: State, effective: Tensor) -> Tensor:
    """The soft use u of the budget, (). ``effective``: r0·α of every group, (G,)."""
    return ((state["budget.costs"] @ effective) / state["budget.limits"]).max()


def update_lambda_(state: State, effective: Tensor, l1: float, gain: float, target: Tensor) -> None:
    """Updates λ, ``state["lambda"]``, in place. No value is copied from the device to the CPU."""
    error = soft_use(state, effective) / target - 1
    change = gain * (error + DAMPING * (error - state["budget.error"]))
    state["budget.error"] = error
    state["lambda"].mul_(change.clamp(-1, 1).exp()).clamp_(l1 / LAMBDA_RANGE, l1 * LAMBDA_RANGE)
