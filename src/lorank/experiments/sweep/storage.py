"""The database of a sweep, by URL: SQLite for one machine, PostgreSQL or MySQL for many."""

from __future__ import annotations

import random
import re
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorank.errors import LorankError

if TYPE_CHECKING:
    from optuna.storages import RDBStorage

MAX_RETRIES = 3
"""How often the trial of a killed worker is tried again: a setting that needs too much memory kills every worker."""
DATABASE = "sweep.db"
HEARTBEAT, GRACE = 10, 60
"""Seconds between two signs of life of a running trial, and without any before another worker takes it."""

_DRIVERS = {
    "psycopg": "psycopg[binary]",
    "psycopg2": "psycopg2-binary",
    "MySQLdb": "mysqlclient",
    "pymysql": "pymysql",
}
"""What pip calls the package of a database driver, by the module."""
_EXAMPLES = "sqlite:///runs/sweep.db or postgresql+psycopg://user@host/database"


class StorageError(LorankError):
    """The database of a sweep cannot be used."""


def check_url(url: str) -> None:
    """Raises StorageError if the text is not the URL of a database that several processes can use."""
    if not re.match(r"[a-z0-9+_]+://", url):
        raise StorageError(f"--storage {url!r} is not the URL of a database: expected one such as {_EXAMPLES}.")
    if url.startswith("sqlite") and (url.rstrip("/").endswith(":") or ":memory:" in url):
        raise StorageError(
            f"--storage {url!r} is a database in memory, which ends with the process: name a file, {_EXAMPLES}."
        )


def default_url(out: Path) -> str:
    """The database in the sweep's own folder."""
    return f"sqlite:///{out.absolute() / DATABASE}"


def shown(url: str) -> str:
    """The URL without its password."""
    return re.sub(r"(://[^:/@]*):[^@/]*@", r"\1:***@", url)


def open_storage(url: str, *, heartbeat: int = HEARTBEAT, grace: int = GRACE) -> RDBStorage:
    """Opens a database, and makes Optuna's tables if there are none.

    Args:
        url: SQLAlchemy's URL of the database.
        heartbeat: seconds between two signs of life of a running trial.
        grace: seconds without a sign of life after which a trial counts as stopped, and is retried.

    Raises:
        StorageError: the URL is wrong, a package is missing, or the database cannot be reached.
    """
    check_url(url)
    from optuna.exceptions import StorageInternalError
    from optuna.storages import RDBStorage, RetryHeartbeatStaleTrialCallback
    from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError

    options: dict[str, Any] = {"pool_pre_ping": True}  # a connection that the server has closed is opened again
    if url.startswith("sqlite"):
        Path(re.sub(r"^[a-z0-9+]+:///|\?.*$", "", url)).parent.mkdir(parents=True, exist_ok=True)
        options["connect_args"] = {"timeout": 60}  # seconds; another process may be writing
    for attempt in range(4):
        try:
            with quiet_optuna():
                storage = RDBStorage(
                    url.replace("{", "{{").replace("}", "}}"),  # Optuna formats the URL
                    engine_kwargs=options,
                    heartbeat_interval=heartbeat,
                    grace_period=grace,
                    heartbeat_stale_trial_callback=RetryHeartbeatStaleTrialCallback(max_retry=MAX_RETRIES),
                )
            break
        except ImportError as error:
            cause = error.__cause__
            module = (cause.name if isinstance(cause, ImportError) else error.name) or "of the database's driver"
            remedy = f'pip install "{_DRIVERS.get(module, module)}"'
            if module == "psycopg2":
                remedy += f', or use the driver psycopg (postgresql+psycopg://…): pip install "{_DRIVERS["psycopg"]}"'
            raise StorageError(f"--storage {shown(url)} needs the package {module}: {remedy}") from error
        except (ArgumentError, NoSuchModuleError) as error:
            raise StorageError(f"--storage {shown(url)}: {error}; expected a URL such as {_EXAMPLES}.") from error
        except (DBAPIError, StorageInternalError) as error:
            if attempt == 3:
                reason = " ".join(str(error.__cause__ or error).split("\n")[0].split())
                raise StorageError(f"--storage {shown(url)} cannot be used: {reason}") from error
            # two processes that make the tables at the same time disturb each other once
            time.sleep(0.2 + random.random() * 0.8)
    if url.startswith("sqlite"):
        _serialise(storage)
    return storage


@contextmanager
def closing(storage: RDBStorage) -> Iterator[RDBStorage]:
    """Closes the connections of a storage at the end."""
    try:
        yield storage
    finally:
        storage.remove_session()
        storage.engine.dispose()


def _serialise(storage: RDBStorage) -> None:
    """Lets SQLite run one transaction after the other.

    Optuna locks rows while it reads and changes them (SELECT … FOR UPDATE), and SQLite has no such lock: two processes
    could take the same trial. Here each transaction locks the whole file from its first statement on.
    """
    from sqlalchemy import event

    storage.engine.dispose()

    def connected(connection: Any, _: Any) -> None:
        connection.isolation_level = None  # the driver itself shall not begin transactions

    def begins(connection: Any) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    event.listen(storage.engine, "connect", connected)
    event.listen(storage.engine, "begin", begins)


@contextmanager
def quiet_optuna() -> Iterator[None]:
    """Hides Optuna's warnings that heartbeats and metric names are experimental, and its log of every trial."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        yield
