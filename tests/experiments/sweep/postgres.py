"""A PostgreSQL server of Debian's packages in a temporary folder, reached by a socket in it."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

PROGRAMS = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))


def reason_against() -> str | None:
    """Why no server can be started here; None if one can."""
    if not PROGRAMS:
        return "PostgreSQL's server is not installed (Debian: apt install postgresql)"
    if find_spec("psycopg") is None:
        return "the package psycopg is not installed"
    if os.geteuid() == 0 and (not shutil.which("setpriv") or _unprivileged() is None):
        return "PostgreSQL refuses to run as root, and there is no setpriv with a user postgres or nobody"
    return None


def _unprivileged() -> str | None:
    names = {entry.pw_name for entry in pwd.getpwall()}
    return next((name for name in ("postgres", "nobody") if name in names), None)


@contextmanager
def server() -> Iterator[str]:
    """Starts a server; yields SQLAlchemy's URL of an empty database."""
    # not pytest's folder: the name of a socket has at most 107 characters, and another user must reach it
    folder = Path(tempfile.mkdtemp(prefix="lorank-pg-", dir="/tmp"))
    folder.chmod(0o755)
    (folder / "data").mkdir(mode=0o700)
    user, become = "test", []
    if os.geteuid() == 0 and (name := _unprivileged()):
        entry = pwd.getpwnam(name)
        become = ["setpriv", f"--reuid={entry.pw_uid}", f"--regid={entry.pw_gid}", "--clear-groups"]
        for path in (folder, folder / "data"):
            os.chown(path, entry.pw_uid, entry.pw_gid)
    programs = PROGRAMS[-1].parent

    def run(*command: str | Path) -> None:
        # output to a file: the server inherits a pipe, and waiting for its end would last as long as the server
        with (folder / "run.log").open("a") as log:
            done = subprocess.run(
                [*become, *map(str, command)], stdout=log, stderr=log, timeout=60, check=False, cwd=folder
            )
        if done.returncode:
            raise RuntimeError(f"{command[0]}: {(folder / 'run.log').read_text()}")

    pg_ctl, data = programs / "pg_ctl", folder / "data"
    try:
        run(programs / "initdb", "-D", data, "-U", user, "-A", "trust", "-E", "UTF8", "--no-locale", "--no-sync")
        options = f"-c listen_addresses='' -c unix_socket_directories={folder} -c fsync=off"
        run(pg_ctl, "-D", data, "-o", options, "-w", "-l", data / "server.log", "start")
        try:
            yield f"postgresql+psycopg://{user}@/postgres?host={folder}"
        finally:
            run(pg_ctl, "-D", data, "-m", "immediate", "-w", "stop")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
