"""Files are whole or not there: errors and full disks leave what was complete before."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from lorank import files
from lorank.files import WriteError, remove_leftovers, write_text

LIMITED = """
import resource, signal, sys
from pathlib import Path
from lorank.files import WriteError, append_text, write_text
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
path = Path(sys.argv[1])
write_text(path, "old" * 100)
append_text(path, "more")
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
for write in (write_text, append_text):
    try:
        write(path, "new" * 1000)
    except WriteError as error:
        assert "there is no space" in str(error), error
    else:
        raise AssertionError("nothing was raised")
"""


def no_space(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_file_is_replaced_in_one_go(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file"
    write_text(path, "old")
    write_text(path, "new")
    assert path.read_text() == "new"
    assert [found.name for found in path.parent.iterdir()] == ["file"]


def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_text(path, "old")
    monkeypatch.setattr(files.os, "fsync", no_space)
    with pytest.raises(WriteError, match="file cannot be written: No space left on device: there is no space"):
        write_text(path, "new")
    assert path.read_text() == "old"
    assert [found.name for found in tmp_path.iterdir()] == ["file"]


@pytest.mark.skipif(not hasattr(resource, "RLIMIT_FSIZE"), reason="no limit on files here")
def test_a_limit_of_the_system_leaves_the_old_file(tmp_path: Path) -> None:
    """The real thing: the kernel refuses to write beyond 1,000 bytes, in the middle of a file."""
    path = tmp_path / "file"
    done = subprocess.run([sys.executable, "-c", LIMITED, path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert path.read_text() == "old" * 100 + "more"
    assert [found.name for found in tmp_path.iterdir()] == ["file"]


def test_leftovers_of_killed_writers_go_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / ".config.yaml.123.part").write_text("half")
    (tmp_path / ".adapter.123.part").mkdir()
    theirs = {"mine.part", ".mine", ".mine.part", ".bashrc.old", ".a.b.old"}
    for name in theirs:
        (tmp_path / name).write_text("mine")
    remove_leftovers(tmp_path)
    assert {found.name for found in tmp_path.iterdir()} == theirs
