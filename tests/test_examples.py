"""The examples run as they stand, only shorter."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_any_loop(tmp_path: Path) -> None:
    ranks = runpy.run_path(str(EXAMPLES / "any_loop.py"))["main"](steps=4, output=str(tmp_path / "adapter"))
    assert len(ranks.history.allocations) == 2
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_trl_sft(tmp_path: Path) -> None:
    pytest.importorskip("trl")
    callback = runpy.run_path(str(EXAMPLES / "trl_sft.py"))["main"](steps=3, samples=2, length=24, output=str(tmp_path))
    assert len(callback.ranks.history.allocations) == 2
