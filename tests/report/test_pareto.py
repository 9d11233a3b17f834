from __future__ import annotations

import math
from pathlib import Path

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
