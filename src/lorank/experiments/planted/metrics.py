"""Metrics of an allocation if the true allocation is known."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from lorank.extras import require

MOST_EXACT = 5
"""The largest number of values for which the bootstrap uses all resamples, n^n for n values."""
RESAMPLES = 10_000


def gap_closed(loss: float, uniform: float, oracle: float) -> float:
    """(L_uniform − L) / (L_uniform − L_oracle): 0 for the loss of uniform ranks, 1 for the loss of the true ranks.

    Negative: worse than uniform ranks. Above 1: better than the true ranks. NaN if the true ranks are not better than
    uniform ranks, because then there is no gap.
    """
    gap = uniform - oracle
    return (uniform - loss) / gap if gap > 0 else float("nan")


def rank_overlap(found: Mapping[str, int], true: Mapping[str, int]) -> float:
    """Σ_m min(found_m, true_m) / Σ_m true_m: the fraction of the true ranks that the found ranks cover. In [0, 1]."""
    return sum(min(found.get(name, 0), rank) for name, rank in true.items()) / sum(true.values())


@torch.no_grad()
def energy_found(update: Tensor, planted: Tensor, root: Tensor) -> float:
    """The fraction of one module's planted update inside the row and column space of the student's update. In [0, 1].

        ‖P_U ΔW* C^(1/2) P_V‖² / ‖ΔW* C^(1/2)‖²

    P_U and P_V project on the column and row space of the student's ΔW C^(1/2), and C = E[x xᵀ] of the module's inputs,
    so ‖ΔW* C^(1/2)‖² = E‖ΔW* x‖² is the energy of the planted update's output.

    Why this metric: it measures where the ranks are, not how far training has come. It does not change if the student's
    update is scaled or its ranks are scaled against each other, so a larger learning rate gives no advantage. It does
    not change if A and B are mixed (B M, M⁻¹ A). Output and input directions must both be right: a rank with the right
    inputs and wrong outputs finds nothing. A student of rank r finds at most the r largest parts of the planted update.
    A student with random directions finds r²/(d_out d_in) of it, almost nothing, so ranks in the wrong module do not
    count. C^(1/2) weights directions by the data: an error along inputs that never occur does not count.

    Args:
        update: the student's ΔW = s·B A, (d_out, d_in).
        planted: ΔW*, (d_out, d_in), not zero.
        root: C^(1/2), (d_in, d_in).
    """
    if not update.isfinite().all():
        return 0.0  # training diverged
    target = (planted @ root).double()  # (d_out, d_in)
    U, values, Vh = torch.linalg.svd((update @ root).double(), full_matrices=False)
    if not values.numel() or values[0] == 0:
        return 0.0
    # a direction below the rounding error of single precision is noise
    significant = values > values[0] * max(update.shape) * torch.finfo(torch.float32).eps
    U, Vh = U[:, significant], Vh[significant]  # (d_out, r), (r, d_in)
    return float((U.T @ target @ Vh.T).square().sum() / target.square().sum())


def mean_and_interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float, float, float]:
    """(mean, standard error, lower bound, upper bound); the bounds are a percentile bootstrap of the mean.

    Up to five values: all n^n resamples are used, so the result is not random (scipy has no such option). More values:
    scipy draws 10,000 resamples. One value, or a NaN or infinite value: only the mean is a number, the rest is NaN.

    Args:
        values: at least one.
        level: the confidence level, in (0, 1).

    Raises:
        MissingPackageError: there are more than five values, and scipy is not installed.
    """
    data = np.asarray(values, dtype=np.float64)
    n = len(data)
    if n < 2 or not np.isfinite(data).all():
        return float(data.mean()), float("nan"), float("nan"), float("nan")
    if n <= MOST_EXACT:
        picks = np.array(list(itertools.product(range(n), repeat=n)))  # (nⁿ, n)
        lower, upper = np.quantile(data[picks].mean(axis=1), [(1 - level) / 2, (1 + level) / 2])
    else:
        require(f"an interval over more than {MOST_EXACT} values", "scipy")
        from scipy.stats import bootstrap

        drawn = bootstrap(
            (data,),
            np.mean,
            n_resamples=RESAMPLES,
            confidence_level=level,
            method="percentile",
            rng=np.random.default_rng(0),
        )
        lower, upper = drawn.confidence_interval
    return float(data.mean()), float(data.std(ddof=1) / np.sqrt(n)), float(lower), float(upper)
