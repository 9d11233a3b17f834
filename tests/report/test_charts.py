"""What the charts say, read from their specifications, and the files that are drawn from them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from matplotlib.image import imread

from lorank.report import ranks_picture
from lorank.report.charts import data, spec, thinned, write_chart
from lorank.report.heatmap import head_chart, head_projections, rank_chart, slider_chart
from lorank.report.modules import change_chart, most_changed, worth_chart
from lorank.report.steps import loss_chart, size_chart
from tests.report.runs import HOSTILE, NAMES, made_run, unmoved_run, unusual_run


def values(chart: Any) -> list[dict[str, Any]]:
    """All rows of a chart's data."""
    found = chart.to_dict()
    own = found.get("data", {}).get("values", [])
    return [*own, *(row for rows in found.get("datasets", {}).values() for row in rows)]


def test_the_heat_map_shows_rank_and_change_of_every_module() -> None:
    run = made_run()
    rows = {row["module"]: row for row in values(rank_chart(run, "change", width=300))}
    assert set(rows) == set(NAMES)
    for name, row in rows.items():
        assert row["rank"] == run.last.ranks[name]
        assert row["change"] == run.last.ranks[name] - 4
    assert rows[NAMES[2]]["signed"] == "+3"
    assert rows[NAMES[1]]["signed"] == "−2"  # with a minus sign, as wide as a plus
    assert rows[NAMES[2]]["projection"] == "up_proj"


def test_the_heat_map_of_heads_shows_each_head_of_a_projection() -> None:
    run = made_run()
    assert head_projections(run) == ["q_proj", "v_proj"]
    rows = values(head_chart(run, "v_proj", width=300))
    assert [(row["block"], row["projection"], row["rank"]) for row in rows[:2]] == [("0", "0", 2), ("0", "1", 0)]
    assert len(rows) == 6
    assert head_projections(unmoved_run()) == []


def test_the_slider_of_notebooks_ends_at_the_last_allocation() -> None:
    found = slider_chart(made_run()).to_dict()
    (slider,) = [one for one in found["params"] if one["name"] == "allocation"]
    assert (slider["value"], slider["bind"]["max"]) == (3, 3)
    assert "params" not in slider_chart(unmoved_run()).to_dict()


def test_bars_name_the_modules_that_gained_and_lost_most() -> None:
    changes = [change for _, _, change in most_changed(made_run(), 2)]
    assert changes == sorted(changes, reverse=True)
    assert changes[0] > 0 > changes[-1]
    assert len(changes) == 4
    assert {row["side"] for row in values(change_chart(made_run(), width=300)) if "side" in row} == {"gained", "lost"}


def test_scores_that_differ_by_orders_of_magnitude_have_a_logarithmic_axis() -> None:
    run = made_run()
    assert run.worth is not None
    found = worth_chart(run, run.worth, width=300).to_dict()
    assert found["encoding"]["x"]["scale"]["type"] == "log"
    assert all(row["shown"] > 0 for row in values(worth_chart(run, run.worth, width=300)))


def test_scores_drowned_by_a_loss_are_shown_above_the_lowest() -> None:
    run = made_run()
    worth = type(run.worth)(30, {name: [-5.0 - 0.01 * index] for index, name in enumerate(NAMES)})
    found = worth_chart(run, worth, width=300)
    shown = [row["shown"] for row in values(found)]
    assert min(shown) == 0
    assert max(shown) == pytest.approx(0.11)
    assert "above the lowest (−5.11)" in found.to_dict()["encoding"]["x"]["title"]


def test_losses_that_are_no_numbers_become_null_and_long_lines_are_thinned() -> None:
    assert data([{"loss": float("nan")}]).to_dict()["values"] == [{"loss": None}]
    assert thinned(range(1000), 5) == [0, 250, 500, 749, 999]
    assert thinned([1, 2], 5) == [1, 2]


def test_dark_and_light_differ_in_their_colours_only() -> None:
    chart = size_chart(made_run(), width=300)
    light, dark = spec(chart, "light"), spec(chart, "dark")
    assert light.pop("config")["background"] != dark.pop("config")["background"]
    assert light == dark


@pytest.mark.parametrize("ending", [".png", ".svg"])
def test_every_chart_is_drawn_into_a_file(ending: str, tmp_path: Path) -> None:
    run = made_run()
    charts = {
        "ranks": rank_chart(run, "rank", width=300),
        "heads": head_chart(run, "q_proj", width=300),
        "loss": loss_chart(run, width=300),
        "size": size_chart(run, width=300),
    }
    for name, chart in charts.items():
        path = write_chart(chart, tmp_path / "new" / f"{name}{ending}")
        if ending == ".png":
            assert imread(path)[..., :3].min() < 0.5
        else:
            assert path.read_text().startswith("<svg")
    with pytest.raises(ValueError, match=r"ends with \.png or \.svg"):
        write_chart(charts["size"], tmp_path / "x.gif")


def test_one_picture_for_a_run_and_for_several(tmp_path: Path) -> None:
    one = imread(ranks_picture([made_run()], tmp_path / "new" / "ranks.png"))
    assert one.shape[1] > one.shape[0]
    several = imread(ranks_picture([made_run(), unmoved_run()], tmp_path / "all.png", title="Where"))
    assert several[..., :3].min() < 0.5
    for run in (unmoved_run(), unusual_run()):
        assert imread(ranks_picture([run], tmp_path / "ranks.png")).size


def test_a_picture_with_strange_names_holds_them_as_text(tmp_path: Path) -> None:
    text = ranks_picture([unusual_run()], tmp_path / "ranks.svg").read_text()
    assert HOSTILE not in text
    assert "&lt;/script" in text
