"""The small versions of `python -m tests.kills --count 100` and of `python -m tests.kills_saving`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch

from tests.kills import difference


def test_a_run_that_is_killed_three_times_ends_as_one_that_was_not() -> None:
    command = [sys.executable, "-m", "tests.kills", "--count", "3", "--methods", "alora"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[1])
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert "3 kills" in done.stdout
    assert " 0 different" in done.stdout


def test_a_save_that_is_killed_at_any_write_touches_no_other_file_and_mixes_no_two_adapters() -> None:
    command = [sys.executable, "-m", "tests.kills_saving", "--every", "4"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[1])
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    found = dict(line.split(":", 1) for line in done.stdout.splitlines() if "moments" in line)
    assert set(found) == {"shared", "alone", "alone, without exchange", "new"}
    assert "'refused'" not in found["alone"]  # it always holds an adapter
    assert all("'new'" in text for text in found.values())
    assert "'refused'" in found["shared"]  # between its two files


def test_the_last_bit_of_a_tensor_is_a_difference() -> None:
    tensor = torch.tensor([1.0, 2.0])
    other = torch.nextafter(tensor, torch.tensor(9.0))
    assert difference({"a": [tensor]}, {"a": [tensor.clone()]}) is None
    assert difference({"a": [tensor]}, {"a": [other]}) == "/a/0"
    assert difference({"a": 1}, {"b": 1}) == ""
