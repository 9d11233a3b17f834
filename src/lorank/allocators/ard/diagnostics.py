"""The four ways in which ARD-LoRA fails, as its paper lists them, seen while they happen.

- rank collapse: nearly all groups are at their minimum: λ is too high.
- rank explosion: the ranks have doubled and still grow: λ is too low.
- oscillation: the ranks of many groups go up and down again and again: β is too low.
- no convergence: the validation loss never falls below where it began: the learning rates do not fit each other.

They are looked at whenever ranks may move. Each is named in the history for as long as it lasts, and warned of once.
"""

from __future__ import annotations

import logging
import math

import torch
from torch import Tensor

from lorank.allocators.base import State

logger = logging.getLogger("lorank")

SIGNATURES = ("rank_collapse", "rank_explosion", "oscillation", "no_convergence")
COLLAPSE_FRACTION = 0.95  # part of the groups at their minimum
EXPLOSION_FACTOR = 2.0  # times the ranks at the start
RISING_CHECKS = 3  # looks in a row in which the total rose
MIN_REVERSALS, OSCILLATION_FRACTION, REVERSAL_WINDOW = (
    4,
    0.1,
    4,
)  # reversals of a group, part of the groups, looks that they are counted over
PATIENCE, MIN_DECREASE = 5, 0.001  # looks before a loss must have fallen, by this part of itself

_REMEDIES = {
    "rank_collapse": "nearly all ranks are at their minimum: lambda is too high. Lower l1 (now {strength:.3g}), or "
    "name a budget and let lambda follow it",
    "rank_explosion": "the ranks have more than doubled and still grow: lambda is too low. Raise l1 (now "
    "{strength:.3g}), or name a budget",
    "oscillation": "ranks go up and down again and again: beta is too low. Raise tv (now {tv:.3g}) or lower alpha_lr "
    "(now {alpha_lr:.3g})",
    "no_convergence": "the validation loss ({loss:.4g}) has not fallen since training began: the learning rates do not "
    "fit each other. Change the optimiser's (lower where the loss rises, higher where it stands still), or lower "
    "alpha_lr (now {alpha_lr:.3g})",
}


def start_diagnostics(rounded: Tensor, total: float) -> State:
    """The memory of the diagnostics. ``rounded``: r of every group, (G,); ``total``: Σ r0·α."""
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
    """Before the first step: where the validation loss begins."""
    if loss is not None and not len(state["seen.losses"]):
        state["seen.losses"] = state["seen.losses"].new_tensor([loss])


def count_reversals_(state: State, rounded: Tensor) -> None:
    """Every step: counts how often each group's rank turns back."""
    change = torch.sign(rounded - state["seen.rounded"])  # (G,)
    state["seen.reversals"] += (change * state["seen.direction"] < 0).to(rounded.dtype)
    state["seen.direction"] = torch.where(change != 0, change, state["seen.direction"])
    state["seen.rounded"] = rounded.clone()


def diagnose_(state: State, total: float, at_minimum: float, loss: float | None) -> list[str]:
    """The signatures that show now.

    Args:
        total: Σ r0·α over all groups.
        at_minimum: the part of the groups that has fallen to its minimum though a budget, if there is one, allows more.
        loss: on the validation batch; None: there is none, and no convergence cannot be seen.
    """
    totals = torch.cat([state["seen.totals"], state["seen.totals"].new_tensor([total])])
    # The first is kept to compare with, of the others as many as a rise is judged by.
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
    """Warns of every signature that was not warned of before. Whether there was one."""
    news = False
    for name in found:
        index = SIGNATURES.index(name)
        if not state["seen.warned"][index]:
            state["seen.warned"][index] = True
            news = True
            logger.warning("ARDLoRA, step %d, %s: %s", step, name.replace("_", " "), _REMEDIES[name].format(**settings))
    return news
