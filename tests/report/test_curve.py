from __future__ import annotations

from pathlib import Path

from matplotlib.image import imread

from lorank.report import Line, curve_picture
from lorank.report.charts import short


def test_the_picture_is_drawn(tmp_path: Path) -> None:
    points = [(100, 3.0), (200, 2.2), (400, 2.0), (830, 1.9)]
    path = curve_picture(
        [Line("predicted", points), Line("trained", points[1:])], tmp_path / "new" / "curve.png", knee=(200, 2.2)
    )
    picture = imread(path)
    assert picture.shape[1] > picture.shape[0] > 500
    assert picture[..., :3].min() < 0.5
    assert curve_picture([Line("one point", points[:1])], tmp_path / "one.png").is_file()


def test_numbers_of_parameters() -> None:
    assert [short(count) for count in (830, 41_472, 2_100_000, 7_000_000_000)] == ["830", "41.5k", "2.1M", "7G"]
