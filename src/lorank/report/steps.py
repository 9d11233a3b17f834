"""What happened over the steps of a run: losses, and the adapter's size beside its budget."""

from __future__ import annotations

from typing import Any

from lorank.report.charts import CONTAINER, ChartLike, Width, data, thinned
from lorank.report.numbers import RunNumbers

MOST_POINTS = 1500
"""Points of a line. A screen is narrower."""
MOST_LINES = 24
"""Allocations that are marked by a line over the whole height, and by a dot."""
SHOWN = "shown"
"""The parameter of a chart that holds the step at which the page's slider stands."""


def loss_chart(run: RunNumbers, *, width: Width = CONTAINER, height: int = 190, title: Any = "") -> ChartLike:
    """Training and validation loss, with the allocations marked. The run has at least one of the two."""
    import altair as alt

    lines = [("training", run.losses), ("validation", run.validation)]
    rows = [
        {"step": step, "loss": loss, "of": name}
        for name, points in lines
        for step, loss in thinned(points, MOST_POINTS)
    ]
    there = [name for name, points in lines if points]
    base = alt.Chart(data(rows)).encode(
        x=_steps(run),
        y=alt.Y("loss:Q", title="loss", scale=alt.Scale(zero=False)),
        tooltip=[alt.Tooltip("of:N", title="loss of"), "step:Q", alt.Tooltip("loss:Q", format=".4f")],
    )
    # the validation loss is the one that counts, so it has the strong colour
    colour = alt.Color("of:N", title=None, scale=alt.Scale(domain=["validation", "lost", "training"], range="category"))
    colour = colour.legend(orient="top", values=list(reversed(there)), symbolType="stroke", symbolStrokeWidth=2)
    drawn = {
        "training": base.mark_line(strokeWidth=1.2),
        "validation": base.mark_line(strokeWidth=2.2, point=alt.OverlayMarkDef(size=45, filled=True)),
    }
    # a layer without data would have no extent
    lines_drawn = [drawn[name].transform_filter(f"datum.of == '{name}'").encode(color=colour) for name in there]
    return alt.layer(*_events(run, height), *lines_drawn).properties(width=width, height=height, title=title)


def size_chart(run: RunNumbers, *, width: Width = CONTAINER, height: int = 150, title: Any = "") -> ChartLike:
    """Parameters over the steps, with the limit of the budget, and the allocations marked."""
    import altair as alt

    frames = thinned(run.frames, MOST_POINTS)
    rows = [
        {"step": frame.step, "parameters": frame.parameters, "ranks": frame.total, "limit": frame.limit}
        for frame in frames
    ]
    end = run.steps if run.steps is not None else run.last.step
    if end > run.last.step:
        rows.append({**rows[-1], "step": end})
    # an initial frame knows no limit: the first allocation's is not shown before it
    base = alt.Chart(data(rows)).encode(x=_steps(run))
    size = base.mark_line(interpolate="step-after", style="strong").encode(
        y=alt.Y("parameters:Q", title="parameters", scale=alt.Scale(zero=True)).axis(format="~s"),
    )
    dots = base.mark_point(style="strong-point", opacity=1 if len(frames) <= MOST_LINES else 0).encode(
        y="parameters:Q",
        tooltip=["step:Q", alt.Tooltip("parameters:Q", format=","), alt.Tooltip("ranks:Q", format=",")],
    )
    layers: list[Any] = [*_events(run, height), size, dots]
    if any(frame.limit is not None for frame in frames):
        limits = base.transform_filter("isValid(datum.limit)")
        layers.insert(-2, limits.mark_line(interpolate="step-after", style="limit").encode(y="limit:Q"))
        last = data([{"step": end, "limit": next(f.limit for f in reversed(frames) if f.limit is not None)}])
        layers.append(
            alt.Chart(last)
            .mark_text(style="note", align="right", baseline="top", dy=5)
            .encode(x="step:Q", y="limit:Q", text=alt.value("budget"))
        )
    return alt.layer(*layers).properties(width=width, height=height, title=title)


def _steps(run: RunNumbers) -> Any:
    import altair as alt

    end = max(
        run.steps or 0,
        run.last.step,
        *(points[-1][0] for points in (run.losses, run.validation) if points),
        1,
    )
    return alt.X("step:Q", title="step", scale=alt.Scale(domain=[0, end], nice=False)).axis(
        grid=False, format="~s", tickCount=6
    )


def _events(run: RunNumbers, height: int) -> list[Any]:
    """The allocations that moved ranks, and a line at the step that the slider shows.

    An allocation is a dotted line; if there are many, a short mark on the axis.
    """
    import altair as alt

    moved = [frame for frame in run.frames if frame.pruned or frame.added]
    rows = [{"step": frame.step, "pruned": frame.pruned, "added": frame.added} for frame in thinned(moved, 200)]
    shown = alt.param(name=SHOWN, value=-1)
    base = alt.Chart(data(rows)).encode(x="step:Q", tooltip=["step:Q", "pruned:Q", "added:Q"])
    few = len(moved) <= MOST_LINES
    marks = base.mark_rule(style="event") if few else base.mark_tick(style="event-tick").encode(y=alt.value(height - 4))
    steps = [{"step": frame.step} for frame in thinned(run.frames, MOST_POINTS)]
    here = (
        alt.Chart(data(steps))
        .add_params(shown)
        .transform_filter(f"datum.step == {SHOWN}")
        .mark_rule(style="shown")
        .encode(x="step:Q")
    )
    return [marks, here]
