from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import optuna
import pytest
import sqlalchemy
import yaml

from lorank.experiments.sweep import storage
from lorank.experiments.sweep.jobs import Place
from lorank.experiments.sweep.storage import closing, open_storage


@pytest.fixture(autouse=True)
def without_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes SQLite faster: a test need not survive a power cut."""
    serialise = storage._serialise

    def faster(opened: optuna.storages.RDBStorage) -> None:
        serialise(opened)
        sqlalchemy.event.listen(
            opened.engine, "connect", lambda connection, _: connection.execute("PRAGMA synchronous=OFF")
        )

    monkeypatch.setattr(storage, "_serialise", faster)


@pytest.fixture
def write(values: dict[str, Any], tmp_path: Path) -> Callable[..., Path]:
    """A sweep of static runs of two steps, with changes."""

    def build(**changes: Any) -> Path:
        base = {key: value for key, value in values.items() if key != "output_dir"}
        base["allocator"] = {"name": "static"}
        base["training"] = {**base["training"], "max_steps": 2, "eval_steps": 2}
        sweep = {
            "base": base,
            "space": {"lora.r": [1, 2], "training.lr": [1e-05]},
            "seeds": [0, 1],
            "output_dir": str(tmp_path / "sweep"),
        }
        path = tmp_path / "sweep.yaml"
        path.write_text(yaml.safe_dump({**sweep, **changes}, sort_keys=False))
        return path

    return build


@pytest.fixture
def open_() -> Iterator[Callable[..., Any]]:
    """Opens a storage with short times, until the end of the test."""
    with ExitStack() as stack:
        yield lambda url: stack.enter_context(closing(open_storage(url, heartbeat=1, grace=1)))


@pytest.fixture
def study_of(open_: Callable[..., Any]) -> Callable[[Place], optuna.Study]:
    """The study of a sweep, as Optuna loads it."""
    return lambda place: optuna.load_study(storage=open_(place.url), study_name=place.study)
