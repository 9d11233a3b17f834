"""ARD-LoRA's mathematics: masks and ranks from α, and the gradient of α from the masks' gradient.

There are G groups (heads, or whole modules) and R stored ranks in all. Each rank has a group and a position i in it:

    m_i = σ((r0·α − i − ½) / τ)        r = max(r_min, ⌊r0·α + ½⌋)

Every function is vectorised over all ranks or all groups, and deterministic on every device.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def temperature(step: int, total_steps: int, start: float, end: float) -> float:
    """τ after ``step`` of ``total_steps`` steps. It falls geometrically from ``start`` to ``end``."""
    done = min(1.0, step / total_steps)
    return float(start * (end / start) ** done)


def layout(counts: Tensor) -> tuple[Tensor, Tensor]:
    """The group of every stored rank, and its position in the group.

    Args:
        counts: (G,) int64, the ranks stored for each group.

    Returns:
        Two (R,) int64 tensors.
    """
    groups = torch.arange(len(counts), device=counts.device)
    member = torch.repeat_interleave(groups, counts)  # (R,)
    first = counts.cumsum(0) - counts  # (G,)
    position = torch.arange(len(member), device=counts.device) - first[member]  # (R,)
    return member, position


def masks(effective: Tensor, member: Tensor, position: Tensor, tau: float) -> Tensor:
    """The masks m of all ranks, (R,). ``effective``: r0·α of every group, (G,)."""
    return torch.sigmoid((effective[member] - position - 0.5) / tau)


def task_gradient(gradient: Tensor, values: Tensor, r0: Tensor, member: Tensor, position: Tensor, tau: float) -> Tensor:
    """∂L/∂α = Σ_i ∂L/∂m_i · m_i (1 − m_i) · r0 / τ, (G,).

    Args:
        gradient: ∂L/∂m, (R,).
        values: m, (R,), as in the forward pass.
        r0: (G,).
        tau: τ, as in the forward pass.
    """
    through = gradient * values * (1 - values)  # (R,)
    # Summed in a grid with one row per group: index_add has no fixed order of summation on a GPU.
    width = int(position.max()) + 1 if len(position) else 0
    grid = through.new_zeros(len(r0), width)  # (G, most ranks of a group)
    grid[member, position] = through
    return grid.sum(1) * r0 / tau


def penalty_gradient(alpha: Tensor, before: Tensor, strength: Tensor | float, tv: float, l1_term: bool) -> Tensor:
    """λ sign(α) + 2 λ β (α_t − α_{t−1}), (G,); without the first term if ``l1_term`` is False."""
    smooth = 2 * strength * tv * (alpha - before)
    return smooth + strength * torch.sign(alpha) if l1_term else smooth


def rounded_ranks(effective: Tensor, min_rank: int, caps: Tensor) -> Tensor:
    """r = max(r_min, ⌊r0·α + ½⌋), limited by the group's cap, (G,) int64."""
    ranks = torch.floor(effective + 0.5).long().clamp_min(min_rank)
    return torch.minimum(ranks, caps)


def stored_ranks(effective: Tensor, tau: float, epsilon: float, min_rank: int, caps: Tensor) -> Tensor:
    """The number of ranks to store for each group: those whose mask exceeds ε, and at least r, (G,) int64."""
    reach = effective - 0.5 + tau * math.log((1 - epsilon) / epsilon)  # m_i > ε for i below this
    ranks = torch.maximum(torch.ceil(reach).long(), rounded_ranks(effective, min_rank, caps))
    return torch.minimum(ranks, caps)


def effective_of_stored(counts: Tensor, tau: float, epsilon: float) -> Tensor:
    """The largest r0·α ≥ 0 for which :func:`stored_ranks` stores ``counts`` ranks by their masks, (G,) float64."""
    return (counts.double() + 0.5 - tau * math.log((1 - epsilon) / epsilon)).clamp_min(0)
