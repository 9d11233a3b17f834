"""How well ranks were allocated, where the right allocation is known."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from lorank.extras import require

MOST_EXACT = 5
"""Values of which all resamples are taken; n^n of them for n values."""
RESAMPLES = 10_000


def gap_closed(loss: float, uniform: float, oracle: float) -> float:
    """(L_uniform − L) / (L_uniform − L_oracle): 0 for no better than uniform ranks, 1 for as good as the true ranks.

    Negative for worse than uniform, above 1 for better than the true ranks. Not a number where the oracle is not better
    than uniform ranks, so that there is no gap.
    """
    gap = uniform - oracle
    return (uniform - loss) / gap if gap > 0 else float("nan")


def rank_overlap(found: Mapping[str, int], true: Mapping[str, int]) -> float:
    """Σ_m min(found_m, true_m) / Σ_m true_m: the part of the true ranks that have a place. In [0, 1]."""
    return sum(min(found.get(name, 0), rank) for name, rank in true.items()) / sum(true.values())


@torch.no_grad()
def energy_found(update: Tensor, planted: Tensor, root: Tensor) -> float:
    """The part of one module's planted update that lies where the student's update acts. In [0, 1].

        ‖P_U ΔW* C^(1/2) P_V‖² / ‖ΔW* C^(1/2)‖²

    P_U and P_V project on the column and row space of the student's ΔW C^(1/2), and C = E[x xᵀ] of the module's inputs,
    so that ‖ΔW* C^(1/2)‖² = E‖ΔW* x‖² is the energy of the planted update's output.

    Why so: it asks where ranks went, not how far training has come. It does not change when the student's update is
    scaled, nor when its ranks are scaled against each other, so that a method is not credited for a larger learning
    rate; and not when A and B are mixed (B M, M⁻¹ A). Output and input directions must both be right: a rank that reads
    the right inputs and writes to the wrong place finds nothing. A student of rank r finds at most the r largest parts
    of the planted update, and a student of random directions r²/(d_out d_in) of it, about nothing, so that ranks in
    the wrong module do not count. C^(1/2) weighs directions as the data do: an error along inputs that never occur is
    none.

    Args:
        update: the student's ΔW = s·B A, (d_out, d_in).
        planted: ΔW*, (d_out, d_in), not zero.
        root: C^(1/2), (d_in, d_in).
    """
    if not update.isfinite().all():
        return 0.0  # training diverged
    wanted = (planted @ root).double()  # (d_out, d_in)
    U, values, Vh = torch.linalg.svd((update @ root).double(), full_matrices=False)
    if not values.numel() or values[0] == 0:
        return 0.0
    # below single precision's rounding a direction is noise, not the student's
    there = values > values[0] * max(update.shape) * torch.finfo(torch.float32).eps
    U, Vh = U[:, there], Vh[there]  # (d_out, r), (r, d_in)
    return float((U.T @ wanted @ Vh.T).square().sum() / wanted.square().sum())


def mean_and_interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float, float, float]:
    """(mean, standard error, lower, upper): the bounds are the percentile bootstrap's for the mean.

    With up to five values all n^n resamples are taken, so that there is nothing random in them, which scipy cannot do;
    with more, scipy draws 10,000.

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
