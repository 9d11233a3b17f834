from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import bootstrap

from lorank.experiments.compare.statistics import (
    Difference,
    Equivalent,
    Examples,
    equivalent_size,
    grouped,
    mean_and_error,
    paired_bootstrap,
    sentence,
)


def test_groups_are_summed() -> None:
    found = grouped(np.array([1.0, 2.0, 4.0]), np.array([1.0, 1.0, 3.0]), np.array([1, 0, 1]))
    assert found.sums.tolist() == [2.0, 5.0]
    assert found.counts.tolist() == [1.0, 4.0]


def losses(seeds: int, groups: int, shift: float, noise: float, seed: int = 0) -> tuple[list[Examples], list[Examples]]:
    """Two methods on the same examples of unequal difficulty and length; ``own`` is better by ``shift`` per label."""
    draw = np.random.default_rng(seed)
    counts = draw.integers(1, 9, groups).astype(float)
    hard = draw.normal(5, 3, groups)
    own, baseline = [], []
    for _ in range(seeds):
        run = draw.normal(0, noise)
        baseline.append(Examples(counts * (hard + draw.normal(0, 0.1, groups)), counts))
        own.append(Examples(counts * (hard - shift + run + draw.normal(0, 0.1, groups)), counts))
    return own, baseline


def values(examples: list[Examples]) -> list[float]:
    return [float(one.sums.sum() / one.counts.sum()) for one in examples]


def slow_twin(own: list[Examples], baseline: list[Examples], resamples: int, seed: int) -> tuple[float, float]:
    """The interval by loops over resamples, seeds and groups, with random numbers of its own."""
    draw = np.random.default_rng(seed)
    seeds, groups = len(own), len(own[0].counts)
    means = []
    for _ in range(resamples):
        picked = draw.integers(0, groups, groups)
        by_seed = []
        for a, b in zip(own, baseline, strict=True):
            total = labels = 0.0
            for group in picked:
                total += a.sums[group] - b.sums[group]
                labels += a.counts[group]
            by_seed.append(total / labels)
        middle = sum(by_seed) / seeds
        chosen = [by_seed[draw.integers(0, seeds)] for _ in range(seeds)]
        means.append(middle + math.sqrt(seeds / (seeds - 1)) * (sum(chosen) / seeds - middle))
    return float(np.quantile(means, 0.025)), float(np.quantile(means, 0.975))


def test_the_bootstrap_is_that_of_a_slow_twin() -> None:
    own, baseline = losses(seeds=4, groups=30, shift=0.1, noise=0.05)
    found = paired_bootstrap(values(own), values(baseline), own, baseline)
    low, high = slow_twin(own, baseline, 3000, seed=1)
    assert found.mean == pytest.approx(np.mean(values(own)) - np.mean(values(baseline)))
    width = high - low
    assert found.low == pytest.approx(low, abs=0.05 * width)
    assert found.high == pytest.approx(high, abs=0.05 * width)
    assert paired_bootstrap(values(own), values(baseline), own, baseline) == found, "it is the same again"


def test_pairs_cancel_what_is_hard_for_both() -> None:
    own, baseline = losses(seeds=3, groups=60, shift=0.1, noise=0.0)
    found = paired_bootstrap(values(own), values(baseline), own, baseline)
    assert found.real
    assert found.high - found.low < 0.1  # the examples themselves differ by several nats
    assert found.p < 0.01
    none = paired_bootstrap(values(baseline), values(baseline), baseline, baseline)
    assert (none.mean, none.low, none.high, none.p, none.real) == (0, 0, 0, 1, False)


def test_over_seeds_alone_it_is_scipys_with_the_right_variance() -> None:
    draw = np.random.default_rng(3)
    own, baseline = draw.normal(0, 1, 6), draw.normal(0.3, 1, 6)
    found = paired_bootstrap(own.tolist(), baseline.tolist())
    theirs = bootstrap(
        (own - baseline,), np.mean, n_resamples=20_000, method="percentile", rng=np.random.default_rng(0)
    ).confidence_interval
    wider, mean = math.sqrt(6 / 5), (own - baseline).mean()
    error = 0.03 * (theirs.high - theirs.low)
    assert found.low == pytest.approx(mean + wider * (theirs.low - mean), abs=error)
    assert found.high == pytest.approx(mean + wider * (theirs.high - mean), abs=error)


def test_an_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    draw = np.random.default_rng(0)
    hits = 0
    for trial in range(200):
        differences = draw.normal(0.5, 1, 10)
        found = paired_bootstrap(differences.tolist(), [0.0] * 10, resamples=500, seed=trial)
        hits += found.low <= 0.5 <= found.high
    assert 0.88 <= hits / 200 <= 0.99


def test_one_seed_has_an_interval_only_over_examples() -> None:
    alone = paired_bootstrap([1.0], [2.0])
    assert alone.mean == -1
    assert math.isnan(alone.low)
    assert not alone.real
    own, baseline = losses(seeds=1, groups=40, shift=0.1, noise=0.0)
    found = paired_bootstrap(values(own), values(baseline), own, baseline)
    assert found.low < found.mean < found.high
    assert math.isnan(paired_bootstrap([1.0, math.nan], [2.0, 2.0]).mean)


def test_mean_and_standard_error() -> None:
    assert mean_and_error([1.0, 3.0]) == (2.0, 1.0)
    assert math.isnan(mean_and_error([1.0])[1])


REFERENCES = [(1.0, 2.0), (2.0, 1.8), (4.0, 1.7)]


@pytest.mark.parametrize(
    ("value", "k", "words"),
    [
        (2.0, 1.0, "as LoRA with as many parameters"),
        (1.9, math.sqrt(2), "as LoRA with 1.4 times the parameters"),
        (1.75, 2 * math.sqrt(2), "as LoRA with 2.8 times the parameters"),
        (1.7, 4.0, "as LoRA with 4 times the parameters"),
        (2.1, None, "worse than LoRA with as many parameters"),
        (1.6, None, "beyond k = 4: better than LoRA with 4 times the parameters"),
        (math.nan, None, "not measured"),
    ],
)
def test_the_size_of_the_lora_that_is_as_good(value: float, k: float | None, words: str) -> None:
    found = equivalent_size(value, REFERENCES, higher_is_better=False)
    assert found.k == (None if k is None else pytest.approx(k))
    assert found.words == words
    mirrored = equivalent_size(-value, [(k, -mean) for k, mean in REFERENCES], higher_is_better=True)
    assert mirrored.words == words


def test_without_a_reference_there_is_no_size() -> None:
    for references in ([], REFERENCES[:1], [(1.0, 2.0), (2.0, math.nan)]):
        assert "no reference" in equivalent_size(1.9, references, higher_is_better=False).words
    crooked = equivalent_size(1.9, [(1.0, 2.0), (2.0, 1.8), (4.0, 1.85)], higher_is_better=False)
    assert crooked == Equivalent(None, "no such unit: more parameters do not always make LoRA better here")


@pytest.mark.parametrize(
    ("difference", "seeds", "higher", "expected"),
    [
        (
            Difference(-0.05, -0.07, -0.03, 0.0002),
            3,
            False,
            "M: the loss is 0.05 lower than B's (95 % interval -0.07 to -0.03, 3 seeds, p = 0.0002): a real "
            "difference, for the better; as LoRA with 2 times the parameters.",
        ),
        (
            Difference(-0.05, -0.07, -0.03, 0.0002),
            5,
            True,
            "M: the loss is 0.05 lower than B's (95 % interval -0.07 to -0.03, 5 seeds, p = 0.0002): a real "
            "difference, for the worse; as LoRA with 2 times the parameters.",
        ),
        (
            Difference(0.01, -0.07, 0.09, 0.8),
            2,
            False,
            "M: the loss is 0.01 higher than B's (95 % interval -0.07 to +0.09, 2 seeds, p = 0.8): not shown to be "
            "real; as LoRA with 2 times the parameters. With 2 seeds the interval is not trustworthy: run at least 3.",
        ),
        (
            Difference(0.01, math.nan, math.nan, math.nan),
            1,
            False,
            "M: the loss is 0.01 higher than B's, but one seed gives no interval: run at least 3 seeds to know whether "
            "it is real.",
        ),
        (
            Difference(math.nan, math.nan, math.nan, math.nan),
            3,
            False,
            "M: a run failed, so there is no difference to B to tell.",
        ),
    ],
)
def test_the_sentence(difference: Difference, seeds: int, higher: bool, expected: str) -> None:
    equivalent = Equivalent(2.0, "as LoRA with 2 times the parameters")
    told = sentence("M", "B", difference, seeds=seeds, metric="loss", higher_is_better=higher, equivalent=equivalent)
    assert told == expected
