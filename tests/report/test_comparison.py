from __future__ import annotations

import math
from dataclasses import replace

import pytest

from lorank.report.comparison import compare_runs, comparison_chart
from lorank.report.numbers import Quality, estimate
from tests.report.runs import made_run, unmoved_run


def seeds(method: str, losses: list[float]) -> list:
    run = made_run()
    return [
        replace(run, name=f"{method}{seed}", method=method, quality=Quality("test loss", loss, "task", method, seed))
        for seed, loss in enumerate(losses)
    ]


def test_an_interval_is_students_t() -> None:
    found = estimate("x", [1.0, 2.0, 3.0])
    assert found.mean == 2
    assert found.high - found.mean == pytest.approx(4.3027 / math.sqrt(3), rel=1e-4)
    assert found.mean - found.low == pytest.approx(found.high - found.mean)
    assert math.isnan(estimate("x", [1.0]).low)
    assert math.isnan(estimate("x", [1.0, math.inf]).low)


def test_seeds_of_one_setting_are_one_row_and_the_best_is_named_first() -> None:
    (found,) = compare_runs([*seeds("A", [3.0, 3.1, 3.2]), *seeds("B", [1.0, 1.1, 1.2])])
    assert [one.label for one in found.groups[""]] == ["B: 3 seeds", "A: 3 seeds"]
    assert "B: 3 seeds has the best test loss, 1.100" in found.sentence
    assert "do not overlap" in found.sentence
    assert found.warning == ""


def test_a_comparison_of_single_seeds_warns() -> None:
    (found,) = compare_runs([made_run(), unmoved_run()])
    assert "only one seed" in found.warning
    assert [one.label for one in found.groups[""]] == ["balanced", "plain"]
    assert "overlap" not in found.sentence


def test_runs_of_different_tasks_are_not_compared() -> None:
    other = replace(made_run("other"), quality=Quality("test loss", 1.0, "another task", "x", 0))
    assert compare_runs([made_run(), other]) == []
    assert compare_runs([replace(made_run(), quality=None), unmoved_run()]) == []


def test_the_chart_shows_seeds_means_and_intervals() -> None:
    (found,) = compare_runs([*seeds("A", [3.0, 3.1, 3.2]), *seeds("B", [1.0])])
    datasets = comparison_chart(found, "", width=300).to_dict()["datasets"].values()
    seeds_shown, means = sorted(datasets, key=len, reverse=True)
    assert len(seeds_shown) == 4
    assert [row["low"] is None for row in means] == [True, False]  # B, with one seed, has no interval
