"""The view of a training run on a terminal, its plain lines elsewhere, and the time left."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from lorank.config.settings import make_config
from lorank.experiments import train
from lorank.experiments.progress import TrainingProgress, sparkline
from lorank.experiments.time_left import TimeLeft


def test_the_time_left_counts_scoring_and_evaluations() -> None:
    left = TimeLeft(100, allocations=[20, 60, 80], eval_steps=50)
    assert left.seconds(0) is None
    left.add_step(1.0)
    assert left.seconds(10) == 90
    assert not left.knows_allocations
    left.add_allocation(30.0)
    left.add_evaluation(5.0)
    assert left.seconds(20) == 80 + 2 * 30 + 2 * 5
    assert left.seconds(80) == 20 + 5
    assert left.seconds(100) == 0
    assert left.allocations(59) == 2


def test_a_sparkline_compares_projections() -> None:
    assert sparkline([0, 4, 8], 8) == "▁▅█"
    assert sparkline([0, 0], 0) == "▁▁"


@pytest.mark.parametrize("terminal", [True, False])
def test_a_run_shows_budget_ranks_and_time_on_a_terminal_and_plain_lines_elsewhere(
    tmp_path: Path, terminal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = tmp_path / "texts"
    texts.mkdir()
    for split in ("train", "validation"):
        (texts / f"{split}.txt").write_text("a sentence about ranks\n" * 80)
    config = make_config(
        {
            "model": {"name": "tiny"},
            "lora": {"r": 2, "target_modules": ["q_proj", "v_proj"]},
            "task": {
                "name": "language_modelling",
                "data": str(texts),
                "block_size": 16,
                "max_train": 16,
                "max_eval": 4,
                "test_split": None,
            },
            "allocator": {"name": "alora", "k1": 2, "k2": 1, "rounds": 2, "unit": "steps", "budget": "100% of adapter"},
            "training": {"epochs": 1, "batch_size": 4, "eval_steps": 2, "logging_steps": 1},
            "output_dir": str(tmp_path / "run"),
        }
    )
    views = []
    original = TrainingProgress.on_step_end

    def look(self: TrainingProgress, *args: object, **kwargs: object) -> None:
        original(self, *args, **kwargs)  # type: ignore[arg-type]
        text = Console(file=io.StringIO(), width=120, record=True)
        text.print(self._view())
        views.append(text.export_text())

    monkeypatch.setattr(TrainingProgress, "on_step_end", look)
    written = io.StringIO()
    train(config, console=Console(file=written, force_terminal=terminal, width=120))
    lines = written.getvalue()
    assert "step 2/4: validation loss" in lines
    assert ("ranks, " in lines) == terminal  # the view
    assert "step 1 of 4" in views[0]
    assert "left and 2 × scoring" in views[0]  # of unknown duration yet
    assert "× scoring" not in views[2]
    assert "% of adapter" in views[3]
    assert "step 4 of 4 0:00 left" in " ".join(views[3].split()) or "0:01 left" in views[3]
    assert views[3].count("q_proj") == views[3].count("v_proj") == 1
    assert " → " in views[3]
