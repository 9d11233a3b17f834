"""The database by URL, and messages about it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lorank.experiments.sweep.storage import StorageError, check_url, open_storage, shown


@pytest.mark.parametrize(
    ("url", "message"),
    [
        (
            "sweep.db",
            "'sweep.db' is not the URL of a database: expected one such as sqlite:///runs/sweep.db or postgresql",
        ),
        ("sqlite://", "is a database in memory"),
        ("sqlite:///:memory:", "is a database in memory"),
    ],
)
def test_what_is_no_database_for_several_processes_is_refused(url: str, message: str) -> None:
    with pytest.raises(StorageError, match=message):
        check_url(url)


def test_a_missing_driver_names_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)  # type: ignore[arg-type]  # None: there is no such module
    with pytest.raises(StorageError, match=r'needs the package psycopg: pip install "psycopg\[binary\]"'):
        open_storage("postgresql+psycopg://me:secret@nowhere/db")
    monkeypatch.setitem(sys.modules, "psycopg2", None)  # type: ignore[arg-type]
    with pytest.raises(
        StorageError, match=r'pip install "psycopg2-binary", or use the driver psycopg \(postgresql\+psyco'
    ):
        open_storage("postgresql+psycopg2://me:secret@nowhere/db")


def test_a_database_that_cannot_be_reached_is_told_without_its_password(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="cannot be used") as caught:
        open_storage(f"postgresql+psycopg://me:secret@/db?host={tmp_path}")
    assert "secret" not in str(caught.value)
    with pytest.raises(StorageError, match="expected a URL such as"):
        open_storage("oracel://me@host/db")


def test_a_password_is_not_shown() -> None:
    assert shown("postgresql+psycopg://me:a:b@host:5432/db") == "postgresql+psycopg://me:***@host:5432/db"
    assert shown("sqlite:////tmp/a:b@c.db") == "sqlite:////tmp/a:b@c.db"


def test_sqlite_runs_one_transaction_after_the_other(tmp_path: Path, open_: Callable[..., Any]) -> None:
    import sqlite3

    storage = open_(f"sqlite:///{tmp_path / 'new' / 'a.db'}")
    with storage.engine.begin() as connection:
        connection.exec_driver_sql("SELECT 1")  # reading is enough to hold the lock
        other = sqlite3.connect(tmp_path / "new" / "a.db", timeout=0)
        try:
            with pytest.raises(sqlite3.OperationalError, match="locked"):
                other.execute("BEGIN IMMEDIATE")
        finally:
            other.close()
