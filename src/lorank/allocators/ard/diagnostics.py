"""Diagnostics for the four failure modes of ARD-LoRA that its paper lists.

- rank collapse: nearly all groups are at their minimum. λ is too high.
- rank explosion: the ranks have doubled and still grow. λ is too low.
- oscillation: the ranks of many groups rise and fall repeatedly. β is too low.
- no convergence: the validation loss never falls below its initial value. The learning rates do not fit each other.

The checks run whenever ranks may move. The history names each failure at every check that finds it. A warning is logged
only the first time.
"""

from __future__ import annotations

import logging
import math

import torch
from torch import Tensor

from lorank.allocators.base import State

logger = logging.getLogger("lorank")

SIGNATURES = ("rank_collapse", "rank_explosion", "oscillation", "no_convergence")
COLLAPSE_FRACTION = 0.95  # collapse: fraction of the groups at their minimum
EXPLOSION_FACTOR = 2.0  # explosion: total ranks as a multiple of the ranks at the start
RISING_CHECKS = 3  # explosion: consecutive checks in which the total rose
MIN_REVERSALS = 4  # oscillation: reversals of a group's rank
OSCILLATION_FRACTION = 0.1  # oscillation: fraction of the groups with so many reversals
REVERSAL_WINDOW = 4  # oscillation: checks over which reversals are counted
PATIENCE = 5  # no convergence: checks before the loss must have fallen
MIN_DECREASE = 0.001  # no convergence: the required decrease, as a fraction of the initial loss

_REMEDIES = {
    "rank_collapse": "nearly all ranks are at their minimum: lambda is too high. Lower l1 (now {strength:.3g}), or "
    "give a budget, to which lambda is then adapted",
    "rank_explosion": "the ranks have more than doubled and still grow: lambda is too low. Raise l1 (now "
    "{strength:.3g}), or give a budget",
    "oscillation": "ranks rise and fall repeatedly: beta is too low. Raise tv (now {tv:.3g}) or lower alpha_lr (now "
    "{alpha_lr:.3g})",
    "no_convergence": "the validation loss ({loss:.4g}) has not fallen since training began: the learning rates do not "
    "fit each other. Change the optimiser's learning rate (lower if the loss rises, higher if it is constant), or "
    "lower alpha_lr (now {alpha_lr:.3g})",
}


def start_diagnostics(rounded: Tensor, total: float) -> State:
    """The initial state of the diagnostics. ``rounded``: r of every group, (G,); ``total``: Σ r0·α."""
    return {
        "seen.rounded": rounded.clone(),
        "seen.direction": torch.zeros_like(rounded),
        "seen.reversals": torch.zeros_like(rounded),
        "seen.totals": torch.tensor([total], dtype=torch.float64),
        "seen.losses": torch.zeros(0, dtype=torch.float64),
        "seen.looks": torch.zeros((), dtype=torch.long),
        "seen.warned": torch.zeros(len(SIGNATURES), dtype=torch.bool),
    }


def record_initial_loss_(state: State, loss: float | None) -> None:
    """Stores the validation loss before the first step."""
    if loss is not None and not len(state["seen.losses"]):
        state["seen.losses"] = state["seen.losses"].new_tensor([loss])


def count_reversals_(state: State, rounded: Tensor) -> None:
    """Counts the reversals of each group's rank. Called after every step. ``rounded``: r of every group, (G,)."""
    change = torch.sign(rounded - state["seen.rounded"])  # (G,)
    state["seen.reversals"] += (change * state["seen.direction"] < 0).to(rounded.dtype)
    state["seen.direction"] = torch.where(change != 0, change, state["seen.direction"])
    state["seen.rounded"] = rounded.clone()


def diagnose_(state: State, total: float, at_minimum: float, loss: float | None) -> list[str]:
    """The signatures of the failures that are present now.

    Args:
        total: Σ r0·α over all groups.
        at_minimum: the fraction of the groups that have fallen to their minimum although the budget allows more.
        loss: the loss on the validation batch; None: there is no batch, and ``no_convergence`` is not checked.
    """
    totals = torch.cat([state["seen.totals"], state["seen.totals"].new_tensor([total])])
    # Keeps the initial total, for comparison, and as many of the last totals as the check for a rise needs.
    state["seen.totals"] = torch.cat([totals[:1], totals[1:][-RISING_CHECKS - 1 :]])
    found = []
    if at_minimum >= COLLAPSE_FRACTION:
        found.append("rank_collapse")
    recent = state["seen.totals"][1:]
    if total >= EXPLOSION_FACTOR * float(totals[0]) and len(recent) > RISING_CHECKS and bool((recent.diff() > 0).all()):
        found.append("rank_explosion")
    if float((state["seen.reversals"] >= MIN_REVERSALS).double().mean()) > OSCILLATION_FRACTION:
        found.append("oscillation")
    state["seen.looks"] += 1
    if int(state["seen.looks"]) % REVERSAL_WINDOW == 0:
        state["seen.reversals"] = torch.zeros_like(state["seen.reversals"])
    if loss is not None:
        losses = torch.cat([state["seen.losses"], state["seen.losses"].new_tensor([loss])])
        state["seen.losses"] = losses
        best = float(losses[1:].nan_to_num(math.inf).min()) if len(losses) > PATIENCE else -math.inf
        if best >= float(losses[0]) * (1 - MIN_DECREASE) or not math.isfinite(loss):
            found.append("no_convergence")
    return found


def warn_(state: State, found: list[str], step: int, **settings: float) -> bool:
    """Logs a warning for every signature that has none yet. Returns whether a warning was logged."""
    warned = False
    for name in found:
        index = SIGNATURES.index(name)
        if not state["seen.warned"][index]:
            state["seen.warned"][index] = True
            warned = True
            logger.warning("ARDLoRA, step %d, %s: %s", step, name.replace("_", " "), _REMEDIES[name].format(**settings))
    return warned
