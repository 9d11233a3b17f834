"""The lines of a run, as a user sees them who has configured nothing, something, or a progress bar."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

import lorank
from lorank.training.history import Record
from lorank.training.log_lines import LINES, AllocationLines
from tests.models import adapted, tiny_llama, token_batch
from tests.training.loops import adamw


def run_a_loop() -> None:
    model = adapted(tiny_llama(), random_B=False)
    optimizer = adamw(model)
    lorank.attach(
        model,
        optimizer,
        lorank.ALoRA(k1=1, k2=1, rounds=2, unit="steps"),
        validation_batch=token_batch(),
        total_steps=4,
    )
    for step in range(4):
        model(**token_batch(seed=step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.fixture
def logger() -> logging.Logger:
    """lorank's logger as in a new process."""
    own = logging.getLogger("lorank")
    own.handlers, own.propagate = [], True
    own.setLevel(logging.NOTSET)
    return own


@contextmanager
def root_handlers(*handlers: logging.Handler) -> Iterator[None]:
    """The root logger has these handlers, and not pytest's."""
    root = logging.getLogger()
    before, root.handlers = root.handlers, list(handlers)
    try:
        yield
    finally:
        root.handlers = before


def test_a_raw_loop_shows_each_allocation_and_the_summary_once(
    logger: logging.Logger, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = []
    for _ in range(2):  # a second run in the process does not double them
        with root_handlers():
            run_a_loop()
        shown.append(capsys.readouterr().err)
    for run in shown:
        for text in ("[lorank] ALoRA: 56 ranks", "step 1 of 4: 14 ranks moved", "step 2 of 4: 14 ranks moved"):
            assert run.count(text) == 1
        assert run.count("[lorank] by projection") == 1
    assert "→" in shown[0]


def test_the_users_own_handler_gets_the_lines_alone(logger: logging.Logger, capsys: pytest.CaptureFixture[str]) -> None:
    own = io.StringIO()
    with root_handlers(logging.StreamHandler(own)):
        run_a_loop()
    assert own.getvalue().count("step 1 of 4: 14 ranks moved") == 1
    assert "step 1" not in capsys.readouterr().err


def test_a_level_that_the_user_set_stays(logger: logging.Logger, capsys: pytest.CaptureFixture[str]) -> None:
    logger.setLevel(logging.WARNING)
    with root_handlers():
        run_a_loop()
    assert not capsys.readouterr().err


def allocation(step: int, moved: int, **fields: object) -> Record:
    shapes = {"a.0.q": (4, 4), "a.0.k": (4, 4)}
    ranks = {"a.0.q": 50 - step, "a.0.k": step}
    return Record(step, "M", ranks, shapes, pruned={"a.0.q": list(range(moved))}, seconds=1.0, **fields)  # type: ignore[arg-type]


def test_many_allocations_share_lines_which_lose_nothing(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "lorank")
    lines = AllocationLines(allocation(0, 0, details={"begins": True}), 1000)
    for step in range(1, 41):
        lines.add(allocation(step, 1))
    lines.add(allocation(1000, 1))
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 2
    assert "step 1 of 1000: 1 rank moved: q −1 → k +1; 50 ranks, 400 parameters; 1.0 s" in messages[0]
    assert "step 1000 of 1000: 40 ranks moved" in messages[1]
    assert "40.0 s" in messages[1]
    assert 1000 / LINES > 40


def test_an_allocation_that_moves_nothing_has_no_line(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "lorank")
    AllocationLines(allocation(0, 0), 10).add(allocation(5, 0))
    assert not caplog.records
