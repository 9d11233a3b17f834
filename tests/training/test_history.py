"""A history keeps every record on disk, whatever happens while it grows, and refuses lines that are no records."""

from __future__ import annotations

import errno
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lorank import files
from lorank.allocators import Allocation, StaticLoRA
from lorank.files import WriteError, append_text
from lorank.lora import LayerPlan, find_layers, resize_
from lorank.training.history import HistoryError, RankHistory, Record, read_history, record_of
from tests.models import adapted, tiny_llama


def record(step: int) -> Record:
    return Record(step, "ALoRA", {"a": 2}, {"a": (4, 4)})


def no_space(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_torn_last_line_of_a_history_is_left_out_and_mended(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    append_text(path, f"{record(0).to_json()}\n{record(3).to_json()}\n{record(5).to_json()[:40]}")
    assert [found.step for found in read_history(path)] == [0, 3]
    history = RankHistory(path)
    history.resume(3, record(3))
    history.append(record(6))
    assert [found.step for found in read_history(path)] == [0, 3, 6]
    assert path.read_bytes().count(b"\n") == 3


def test_a_history_that_cannot_grow_keeps_its_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    history = RankHistory(tmp_path / "history.jsonl")
    history.begin(record(0))
    monkeypatch.setattr(files.os, "fsync", no_space)
    with pytest.raises(WriteError, match="there is no space"):
        history.append(record(3))
    monkeypatch.undo()
    assert [found.step for found in read_history(tmp_path / "history.jsonl")] == [0]


def test_a_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    written = Record(
        3, "ALoRA", {"a": 2}, {"a": (4, 5)}, {"a": [0]}, {"a": 1}, {"a": [0.5, -1.0]}, 1.5, {"loss": 2.0}, {"a": 1}
    )
    path = tmp_path / "history.jsonl"
    RankHistory(path).append(written)
    (found,) = read_history(path)
    assert found == replace(written, shapes={"a": [4, 5]})
    assert (found.total_rank, found.parameters) == (2, 2 * (4 + 5))


def test_a_new_run_renames_the_older_files(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    for step in range(3):
        RankHistory(path).begin(record(step))
    steps = {found.name: read_history(found)[0].step for found in tmp_path.iterdir()}
    assert steps == {"history.jsonl": 2, "history.1.jsonl": 0, "history.2.jsonl": 1}


def test_a_resumed_run_drops_the_records_after_its_step(tmp_path: Path) -> None:
    history = RankHistory(tmp_path / "history.jsonl")
    for step in (0, 3, 5):
        history.append(record(step))
    history.resume(4, record(4))
    assert [found.step for found in history] == [0, 3]
    assert [found.step for found in read_history(tmp_path / "history.jsonl")] == [0, 3]


def test_a_rollback_in_memory_keeps_the_records_up_to_its_step() -> None:
    history = RankHistory()
    for step in (0, 3, 5):
        history.append(record(step))
    history.resume(4, record(4))
    assert [found.step for found in history] == [0, 3]


def test_records_in_memory_that_do_not_lead_to_the_present_ranks_are_dropped() -> None:
    """A new process that continues a run has only its own start in memory."""
    history = RankHistory()
    history.begin(record(0))
    history.resume(4, replace(record(4), ranks={"a": 7}))
    assert [found.step for found in history] == [4]


def test_a_history_that_cannot_begin_leaves_the_older_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "history.jsonl"
    RankHistory(path).begin(record(0))
    before = path.read_bytes()

    def full(path: Path, _: str) -> None:
        path.touch()
        raise WriteError("no space")

    monkeypatch.setattr("lorank.training.history.append_text", full)
    with pytest.raises(WriteError):
        RankHistory(path).begin(record(1))
    assert {found.name: found.read_bytes() for found in tmp_path.iterdir()} == {"history.jsonl": before}


def test_a_run_that_is_resumed_without_its_file_begins_with_the_present_ranks(tmp_path: Path) -> None:
    history = RankHistory(tmp_path / "history.jsonl")
    history.resume(4, record(4))
    assert [found.step for found in read_history(tmp_path / "history.jsonl")] == [4]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"step": -1}, "step: expected a whole number"),
        ({"ranks": {"a": True}}, "ranks: a: expected a whole number, got True"),
        ({"ranks": {"a": 1 << 25}}, "ranks: a: expected a whole number"),
        ({"shapes": {"a": [4]}}, r"shapes: a: expected \(d_in, d_out\)"),
        ({"shapes": {}}, "ranks and shapes name different modules: 'a'"),
        ({"scores": {"a": ["x"]}}, "scores: a: expected a number, got 'x'"),
        ({"details": []}, "details: expected a mapping, got list"),
    ],
)
def test_a_line_that_is_no_record_is_refused_by_its_number(change: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    append_text(path, record(0).to_json() + "\n" + json.dumps({**json.loads(record(1).to_json()), **change}) + "\n")
    with pytest.raises(HistoryError, match=rf"history\.jsonl, line 2: .*{message}"):
        read_history(path)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(HistoryError, match="there is no rank history at"):
        read_history(tmp_path / "nowhere.jsonl")


def test_the_record_of_an_allocation() -> None:
    layers = find_layers(adapted(tiny_llama()))
    first, second, *_ = layers
    before = layers.ranks
    plan = {first: LayerPlan((0, 3)), second: LayerPlan((0, 1, 2, 3), 2)}
    resize_(layers, plan)
    layers.learn_gates().values[0] = 0
    found = record_of(7, StaticLoRA(), layers, Allocation(plan, {first: torch.arange(4.0)}, {"loss": 1.0}), before, 0.5)
    assert (found.step, found.method, found.seconds, found.details) == (7, "StaticLoRA", 0.5, {"loss": 1.0})
    assert found.ranks == {**before, first: 2, second: 6}
    assert found.pruned == {first: [1, 2]}
    assert found.added == {second: 2}
    assert found.scores == {first: [0.0, 1.0, 2.0, 3.0]}
    assert found.active == {**found.ranks, first: 1}
    assert found.shapes[first] == (32, 32)
