"""The demo replaces its own results only. (`tests/cli/test_app.py` shows its options.)"""

from __future__ import annotations

from pathlib import Path

import pytest

from lorank.experiments import RunFolderError
from lorank.experiments.demo import conclusion, main


def test_a_picture_that_is_of_no_demo_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "ranks.png").write_text("mine")
    with pytest.raises(RunFolderError, match=r"ranks\.png would be replaced"):
        main(tmp_path)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"]


def test_the_conclusion_says_what_came_out_also_if_it_is_bad() -> None:
    losses = {"static": 4.0, "alora": 4.25, "balanced": 3.5, "double": 4.0}
    text = conclusion(losses)
    assert (
        "BalancedLoRA ends 0.500 below its loss and ALoRA 0.250 above; LoRA of twice the size ends 0.000 above" in text
    )
