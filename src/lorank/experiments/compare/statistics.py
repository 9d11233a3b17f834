"""Is a difference real, and how large is it?

The difference of a method to the baseline has two sources of chance: the seed of a run, and the test examples. Both are
resampled, in pairs: both methods have the same seeds and the same examples, so what is hard for both cancels.

    D*_b = mean over resampled seeds s of   Σ_g w_g Δ_sg / Σ_g w_g n_g

Δ_sg is the difference of the summed losses of the examples of group g (examples with one prompt), n_g their number of
labels, and w_g how often the resample has the group. A bootstrap of n seeds has (n − 1)/n of the variance that n seeds
have, a third too little for three seeds. So the resampled seeds' deviations from their mean are multiplied by
√(n/(n − 1)).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
RESAMPLES = 10_000
LEVEL = 0.95
FEW_SEEDS = 3
"""With fewer seeds, an interval is not trustworthy."""
_CHUNK = 2_000_000
"""The most numbers of one array of resampled weights."""


@dataclass(frozen=True)
class Difference:
    """A method minus the baseline, in the unit of the metric.

    Args:
        mean: the mean over seeds.
        low: the lower bound of the interval; NaN: not known, as for one seed without losses per example.
        high: the upper bound.
        p: two-sided: how probable so large a difference is if there is none. In (0, 1]; NaN: not known.
    """

    mean: float
    low: float
    high: float
    p: float

    @property
    def real(self) -> bool:
        """Whether 0 is outside the interval."""
        return self.low > 0 or self.high < 0


@dataclass(frozen=True)
class Examples:
    """The values of test examples in groups that are resampled together.

    Args:
        sums: (groups,) the sum of the metric's values over the examples of a group.
        counts: (groups,) what the sum is divided by: the number of labels, or of examples.
    """

    sums: Array
    counts: Array


def grouped(values: Array, counts: Array, groups: NDArray[np.int64]) -> Examples:
    """Sums by group. All arguments (examples,)."""
    size = int(groups.max()) + 1
    sums, sizes = (np.bincount(groups, some, size).astype(np.float64) for some in (values, counts))
    return Examples(sums, sizes)


def paired_bootstrap(
    own: Sequence[float],
    baseline: Sequence[float],
    own_examples: Sequence[Examples] | None = None,
    baseline_examples: Sequence[Examples] | None = None,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Difference:
    """The difference of two methods with its bootstrap interval (95 %, percentiles).

    Args:
        own: the metric per seed.
        baseline: the baseline's, for the same seeds in the same order.
        own_examples: per seed; None: only seeds are resampled.
        baseline_examples: per seed, the same examples in the same groups.
        resamples: their number.
        seed: of the resampling.
    """
    differences = np.asarray(own, float) - np.asarray(baseline, float)  # (seeds,)
    n, mean = len(differences), float(differences.mean())
    nothing = Difference(mean, math.nan, math.nan, math.nan)
    if not np.isfinite(differences).all() or (n < 2 and own_examples is None):
        return nothing
    draw = np.random.default_rng(seed)
    seeds = draw.multinomial(n, np.full(n, 1 / n), size=resamples) / n  # (resamples, seeds)
    if own_examples is None or baseline_examples is None:
        drawn = np.broadcast_to(differences, (resamples, n))
    else:
        sums = np.stack([a.sums - b.sums for a, b in zip(own_examples, baseline_examples, strict=True)])
        drawn = _resampled(sums, own_examples[0].counts, resamples, draw)  # (resamples, seeds)
    middle = drawn.mean(axis=1)
    spread = (drawn * seeds).sum(axis=1) - middle
    found = middle + spread * (math.sqrt(n / (n - 1)) if n > 1 else 0)
    low, high = np.quantile(found, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    # one is added, so that p is never 0: a resample more would have been the sample itself
    tail = min(int((found <= 0).sum()), int((found >= 0).sum()))
    return Difference(mean, float(low), float(high), min(1.0, 2 * (tail + 1) / (resamples + 1)))


def _resampled(sums: Array, counts: Array, resamples: int, draw: np.random.Generator) -> Array:
    """Per resample of the groups and per seed, Σ w sums / Σ w counts. sums: (seeds, groups), counts: (groups,)."""
    groups = len(counts)
    rows = max(1, _CHUNK // groups)
    parts = []
    for start in range(0, resamples, rows):
        weights = draw.multinomial(groups, np.full(groups, 1 / groups), size=min(rows, resamples - start))
        parts.append(weights @ sums.T / (weights @ counts)[:, None])  # (rows, seeds)
    return np.concatenate(parts)


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """The mean and its standard error over seeds; the error is NaN for one seed."""
    from scipy.stats import sem

    return float(np.mean(values)), float(sem(values)) if len(values) > 1 else math.nan


@dataclass(frozen=True)
class Equivalent:
    """A method's result in units of LoRA with k times the parameters.

    Args:
        k: the size; None: it is outside the references, or there is none.
        words: the same for a sentence, such as "as LoRA with 1.6 times the parameters".
    """

    k: float | None
    words: str


def equivalent_size(value: float, references: Sequence[tuple[float, float]], *, higher_is_better: bool) -> Equivalent:
    """The size k of the LoRA that would be as good, by interpolation between references, linear in log k.

    Args:
        value: the method's mean of the metric.
        references: pairs (k, mean of LoRA with k times the parameters).
        higher_is_better: the direction of the metric.
    """
    sign = 1 if higher_is_better else -1
    points = sorted((k, sign * mean) for k, mean in references if math.isfinite(mean))
    if len(points) < 2:
        return Equivalent(None, "no reference: LoRA of several sizes was not run")
    if any(after[1] <= before[1] for before, after in itertools.pairwise(points)):
        return Equivalent(None, "no such unit: more parameters do not always make LoRA better here")
    goal = sign * value
    if not math.isfinite(goal):
        return Equivalent(None, "not measured")
    if goal < points[0][1]:
        return Equivalent(None, f"worse than LoRA with {_times(points[0][0])}")
    if goal > points[-1][1]:
        return Equivalent(None, f"beyond k = {points[-1][0]:g}: better than LoRA with {_times(points[-1][0])}")
    sizes, goals = np.log([k for k, _ in points]), [mean for _, mean in points]
    k = float(np.exp(np.interp(goal, goals, sizes)))
    return Equivalent(k, f"as LoRA with {_times(k)}")


def _times(k: float) -> str:
    return "as many parameters" if round(k, 2) == 1 else f"{k:.2g} times the parameters"


def sentence(
    title: str,
    baseline: str,
    difference: Difference,
    *,
    seeds: int,
    metric: str,
    higher_is_better: bool,
    equivalent: Equivalent,
) -> str:
    """One plain sentence: is the difference real, and how large is it?"""
    if math.isnan(difference.mean) or math.isinf(difference.mean):
        return f"{title}: a run failed, so there is no difference to {baseline} to tell."
    amount = f"{abs(difference.mean):.3g} {'higher' if difference.mean > 0 else 'lower'} than"
    told = f"{title}: the {metric.replace('_', ' ')} is {amount if difference.mean else 'equal to'} {baseline}'s"
    if math.isnan(difference.low):
        return f"{told}, but one seed gives no interval: run at least {FEW_SEEDS} seeds to know whether it is real."
    better = (difference.mean > 0) == higher_is_better
    told += (
        f" (95 % interval {difference.low:+.3g} to {difference.high:+.3g}, {seeds} seed{'s' if seeds > 1 else ''}, "
        f"p = {difference.p:.2g})"
    )
    verdict = (
        f"a real difference, for the {'better' if better else 'worse'}" if difference.real else "not shown to be real"
    )
    told += f": {verdict}; {equivalent.words}."
    if seeds < FEW_SEEDS:
        told += (
            f" With {seeds} seed{'s' if seeds > 1 else ''} the interval is not trustworthy: run at least {FEW_SEEDS}."
        )
    return told
