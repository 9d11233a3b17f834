"""Methods and settings side by side: means with their intervals, and the value of every seed."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from lorank.report.charts import CONTAINER, ChartLike, Width, data
from lorank.report.numbers import Comparison, Estimate, RunNumbers, estimate

FEW_SEEDS = 3
LABEL_HEIGHT = 18
"""Pixels between two labels."""


def comparison_chart(comparison: Comparison, group: str, *, width: Width = CONTAINER, title: Any = "") -> ChartLike:
    """One row per estimate: the seeds as small dots, the mean as a large one, its 95 % interval as a line."""
    import altair as alt

    estimates = comparison.groups[group]
    order = [one.label for one in estimates]
    everyone = [one for some in comparison.groups.values() for one in some]
    ends = [v for one in everyone for v in (one.mean, one.low, one.high, *one.values) if math.isfinite(v)] or [0.0]
    margin = (max(ends) - min(ends)) * 0.04 or 0.01
    y = alt.Y("label:N", sort=order, title=None).axis(labelLimit=170, ticks=False, domain=False, grid=True)
    scale = alt.Scale(domain=[min(ends) - margin, max(ends) + margin], zero=False, nice=False)
    better = "higher" if comparison.higher_is_better else "lower"
    title_of_x = f"{comparison.metric} ({better} is better)"
    x = alt.X("value:Q", title=title_of_x, scale=scale).axis(tickCount=6)
    seeds = [{"label": one.label, "value": value} for one in estimates for value in one.values]
    means = [{"label": one.label, "value": one.mean, "low": one.low, "high": one.high} for one in estimates]
    layers = [
        alt.Chart(data(means))
        .transform_filter("isValid(datum.low)")
        .mark_rule(style="strong")
        .encode(x=alt.X("low:Q", title=title_of_x, scale=scale), x2="high:Q", y=y),
        alt.Chart(data(seeds)).mark_point(style="faint-point").encode(x=x, y=y),
        alt.Chart(data(means))
        .mark_point(style="strong-point")
        .encode(
            x=x,
            y=y,
            tooltip=[
                "label:N",
                alt.Tooltip("value:Q", title="mean", format=".4g"),
                alt.Tooltip("low:Q", format=".4g"),
                alt.Tooltip("high:Q", format=".4g"),
            ],
        ),
    ]
    return alt.layer(*layers).properties(width=width, height=28 * len(order), title=title)


def size_chart(comparison: Comparison, *, width: Width = CONTAINER, height: int = 200, title: Any = "") -> ChartLike:
    """The metric against the trained parameters, one labelled dot per estimate. All have parameters and a mean."""
    import altair as alt

    dots = [
        (one.parameters, one.mean, one.label)
        for some in comparison.groups.values()
        for one in some
        if one.parameters and math.isfinite(one.mean)
    ]
    sizes, values = [size for size, _, _ in dots], [value for _, value, _ in dots]
    # a label extends towards the middle, where there is space
    middle = (min(sizes) + max(sizes)) / 2
    apart = LABEL_HEIGHT / height * (max(values) - min(values))
    rows = [
        {"label": label, "parameters": size, "value": value, "at": at, "right": right}
        for right in (False, True)
        for (value, size, label), at in _spread(
            [(value, size, label) for size, value, label in dots if (size > middle) is right], apart
        )
    ]
    x = alt.X("parameters:Q", title="trained parameters at the end", scale=alt.Scale(zero=False, padding=24)).axis(
        format="~s", tickCount=5
    )
    scale = alt.Scale(zero=False, padding=16)
    base = alt.Chart(data(rows))
    points = base.mark_point(style="strong-point").encode(
        x=x,
        y=alt.Y("value:Q", title=comparison.metric, scale=scale),
        tooltip=["label:N", alt.Tooltip("parameters:Q", format=","), alt.Tooltip("value:Q", format=".4f")],
    )
    left, right = (base.transform_filter(f"datum.right == {side}") for side in ("false", "true"))
    labels = [left.mark_text(style="label", align="left", dx=9, baseline="middle")]
    if any(row["right"] for row in rows):  # a layer without data would have no extent
        labels.append(right.mark_text(style="label", align="right", dx=-9, baseline="middle"))
    texts = [text.encode(x=x, y=alt.Y("at:Q", title=comparison.metric, scale=scale), text="label:N") for text in labels]
    return alt.layer(points, *texts).properties(width=width, height=height, title=title)


Dot = tuple[float, float, str]


def _spread(dots: Sequence[Dot], apart: float) -> list[tuple[Dot, float]]:
    """The dots, from the lowest value, each with the height of its label, at least ``apart`` above the one before."""
    placed: list[tuple[Dot, float]] = []
    for dot in sorted(dots):
        placed.append((dot, max(dot[0], placed[-1][1] + apart) if placed else dot[0]))
    return placed


def compare_runs(runs: Sequence[RunNumbers]) -> list[Comparison]:
    """The comparisons that several runs allow: one per task and metric with at least two runs.

    Runs with the same setting are seeds of one estimate.
    """
    tasks: dict[tuple[str, str], list[RunNumbers]] = defaultdict(list)
    for run in runs:
        if run.quality is not None and math.isfinite(run.quality.value):
            tasks[run.quality.task, run.quality.metric].append(run)
    return [_compare(task, metric, some) for (task, metric), some in tasks.items() if len(some) > 1]


def _compare(task: str, metric: str, runs: Sequence[RunNumbers]) -> Comparison:
    settings: dict[str, list[RunNumbers]] = defaultdict(list)
    for run in runs:
        assert run.quality is not None
        settings[run.quality.setting].append(run)
    estimates: list[Estimate] = []
    for some in settings.values():
        label = some[0].name if len(some) == 1 else f"{some[0].method}: {len(some)} seeds"
        if label in {one.label for one in estimates}:
            label = f"{label} ({some[0].name})"
        values = [run.quality.value for run in some if run.quality]
        size = sum(run.last.parameters for run in some) / len(some)
        estimates.append(estimate(label, values, parameters=size))
    assert runs[0].quality is not None
    higher = runs[0].quality.higher_is_better
    estimates.sort(key=lambda one: -one.mean if higher else one.mean)
    fewest = min(len(one.values) for one in estimates)
    warning = ""
    if fewest < FEW_SEEDS:
        count = "one seed" if fewest == 1 else f"{fewest} seeds"
        warning = f"Some settings have only {count}: another seed can change the order. Compare three or more."
    return Comparison(
        task, metric, {"": estimates}, higher_is_better=higher, sentence=_sentence(estimates, metric), warning=warning
    )


def _sentence(estimates: Sequence[Estimate], metric: str) -> str:
    if len(estimates) == 1:
        one = estimates[0]
        interval = f", 95 % interval {one.low:#.4g} to {one.high:#.4g}" if math.isfinite(one.low) else ""
        return f"{one.label} has a mean {metric} of {one.mean:#.4g}{interval}."
    first, second = estimates[:2]
    text = f"{first.label} has the best {metric}, {first.mean:#.4g}; {second.label} follows with {second.mean:#.4g}."
    if math.isfinite(first.low) and math.isfinite(second.low):
        apart = first.high < second.low or second.high < first.low
        text += (
            " Their 95 % intervals do not overlap."
            if apart
            else " Their 95 % intervals overlap, so the order of these two is open."
        )
    return text
