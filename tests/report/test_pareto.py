from __future__ import annotations

import math
from pathlib import Path

import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import imread

from lorank.report.pareto import Point, pareto_front, pareto_picture


def test_the_front_is_what_nothing_else_beats() -> None:
    small, middle, large = Point("small", 1, 3.0), Point("middle", 2, 2.0), Point("large", 4, 1.0)
    beaten, equal_size = Point("beaten", 3, 2.0), Point("same size", 2, 2.5)
    diverged, twin = Point("diverged", 0.5, math.nan), Point("twin", 2, 2.0)
    front = pareto_front([large, beaten, diverged, equal_size, middle, twin, small])
    assert front == [small, middle, twin, large]
    assert pareto_front([]) == []


def test_the_picture_is_drawn(tmp_path: Path) -> None:
    points = [Point("a", 10, 1.0, 0.1), Point("b", 20, 0.5), Point("c", 30, 0.7), Point("gone", 5, math.inf)]
    path = pareto_picture(points, tmp_path / "new" / "front.png", size="parameters", loss="loss", title="t")
    picture = imread(path)
    assert picture.shape[:2] == (750, 1125)
    assert picture[..., :3].min() < 0.5


def drawn(points: list[Point], path: Path, monkeypatch: pytest.MonkeyPatch) -> Axes:
    """The axes of a picture."""
    figures: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    pareto_picture(points, path, size="size", loss="loss", title="the title")
    return figures[0].axes[0]


def test_a_picture_shows_only_what_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    two = drawn([Point("a", 1, 2.0), Point("b", 2, 1.0)], tmp_path / "p.png", monkeypatch)
    assert two.get_title() == "the title"
    assert two.get_legend() is None  # both are on the front: nothing to tell apart
    assert len(two.lines) == 1  # the points, and no step between two of them
    three = [Point("a", 1, 3.0), Point("b", 2, 2.0), Point("c", 3, 1.0), Point("d", 3, 2.5)]
    axes = drawn(three, tmp_path / "p.png", monkeypatch)
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [
        "on the Pareto front",
        "beaten by another setting",
    ]
    assert len(axes.lines) == 3
    assert {text.get_text() for text in axes.texts} == {"a", "b", "c", "d"}


def test_of_many_points_only_the_front_is_labelled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    many = [Point(f"p{number}", number, 30.0 + number) for number in range(1, 20)]
    axes = drawn([*many, Point("low", 25, 1.0)], tmp_path / "p.png", monkeypatch)
    assert {text.get_text() for text in axes.texts} == {"p1", "low"}
