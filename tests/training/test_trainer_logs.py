"""The ranks in the Trainer's logs: read back from where users look."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

import lorank
from tests.models import adapted, tiny_llama
from tests.training.trainer_run import rows

ROUNDS: dict[str, Any] = {"k1": 2, "k2": 2, "rounds": 2, "unit": "steps"}


def trainer(output: Path, *callbacks: Any, **changes: Any) -> tuple[Trainer, lorank.RankCallback]:
    settings = {
        "output_dir": str(output),
        "per_device_train_batch_size": 4,
        "max_steps": 6,
        "logging_steps": 3,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
    }
    ranks = lorank.RankCallback(lorank.ALoRA(**ROUNDS, budget="100% of adapter"), validation_batch=rows(4, seed=2))
    made = Trainer(
        model=adapted(tiny_llama(), random_B=False),
        args=TrainingArguments(**{**settings, **changes}),
        train_dataset=rows(16, seed=0),
        eval_dataset=rows(4, seed=1),
        callbacks=[ranks, *callbacks],
    )
    return made, ranks


class Noting(TrainerCallback):
    """What a reporting callback is given; it is called before RankCallback, as transformers' own are."""

    def __init__(self) -> None:
        self.logs: list[dict[str, Any]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        assert kwargs["model"] is not None
        self.logs.append({**logs, "step": state.global_step})


def test_tensorboard_shows_ranks_unasked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    run, ranks = trainer(tmp_path, report_to=["tensorboard"])
    run.train()
    events = EventAccumulator(str(tmp_path / "board"))
    events.Reload()
    total = events.Scalars("train/ranks/total")
    assert [event.step for event in total] == [0, 2, 4, 6]
    assert total[-1].value == sum(ranks.by_module.values())
    module = next(iter(ranks.by_module))
    steps = {record.step: record for record in ranks.ranks.history}  # type: ignore[union-attr]
    for event in events.Scalars(f"train/rank/{module}"):
        at = max(step for step in steps if step <= event.step)
        assert event.value == steps[at].ranks[module]
    assert events.Scalars("train/ranks/budget_used")[0].value == 1
    assert events.Scalars("train/ranks/scoring_seconds")[-1].value > 0


def test_log_history_and_every_callback_but_the_printing_ones_hold_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    noting = Noting()
    run, ranks = trainer(tmp_path, noting)
    assert any(isinstance(callback, PrinterCallback) for callback in run.callback_handler.callbacks)
    run.train()
    entries = [entry for entry in run.state.log_history if "ranks/total" in entry]
    assert [entry["step"] for entry in entries] == [0, 2, 4, 6]
    assert [entry for entry in noting.logs if "ranks/total" in entry] == entries
    assert {key for key in entries[-1] if key.startswith("rank/")} == {f"rank/{name}" for name in ranks.by_module}
    assert "rank/" not in capsys.readouterr().out  # a dictionary of hundreds of modules
    assert "train_runtime" in run.state.log_history[-1]
    json.dumps(run.state.log_history)


def test_a_resumed_run_continues_the_logs(tmp_path: Path) -> None:
    run, _ = trainer(tmp_path / "a", save_strategy="steps", save_steps=3)
    run.train()
    resumed, _ = trainer(tmp_path / "b", save_strategy="steps", save_steps=3)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))
    both = [
        [
            {key: value for key, value in entry.items() if key != "ranks/scoring_seconds"}
            for entry in one.state.log_history
            if "ranks/total" in entry and entry["step"] != 0
        ]
        for one in (run, resumed)
    ]
    for entry in both[0]:
        entry.pop("ranks/moved")
    for entry in both[1]:
        entry.pop("ranks/moved")  # b has no history of the steps before
    assert both[0] == both[1]


def test_the_best_checkpoint_s_ranks_are_the_last_entry(tmp_path: Path) -> None:
    class TheOlderTheBetter(TrainerCallback):
        def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
            metrics["eval_age"] = state.global_step

    every_step = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_age", "greater_is_better": False}
    run, ranks = trainer(tmp_path, TheOlderTheBetter(), **every_step, **best)
    run.train()
    assert run.state.best_global_step == 1  # before the first allocation
    assert set(ranks.by_module.values()) == {4}
    last = [entry for entry in run.state.log_history if "ranks/total" in entry][-1]
    assert {name: last[f"rank/{name}"] for name in ranks.by_module} == ranks.by_module
    assert "train_runtime" in run.state.log_history[-1]
    assert "the result is an earlier checkpoint" in str(ranks.summary())
    assert ranks.summary().data["modules"] != {}


def test_trackio_shows_ranks_unasked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tried with trackio 0.43, which does not fit the pinned packages."""
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read when it is imported
    trackio = pytest.importorskip("trackio", reason="trackio is not installed: pip install trackio")
    storage = pytest.importorskip("trackio.sqlite_storage").SQLiteStorage
    run, ranks = trainer(tmp_path, report_to=["trackio"], project="lorank-test")
    run.train()
    (only,) = trackio.Api().runs("lorank-test")
    found = [row for row in storage.get_logs("lorank-test", only.name) if "train/ranks/total" in row]
    assert len(found) == 4  # the start, two allocations, the end
    assert {name: found[-1][f"train/rank/{name}"] for name in ranks.by_module} == ranks.by_module


def test_before_training_the_callback_says_so() -> None:
    callback = lorank.RankCallback(lorank.ALoRA(**ROUNDS))
    assert "training has not begun" in repr(callback)
    with pytest.raises(lorank.LorankError, match="training has not begun"):
        callback.summary()
