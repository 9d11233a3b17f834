"""docs/compatibility.md says what tests/compatibility.py says, and that names tests which are there."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from tests.compatibility import LOOPS, ROWS, cells, table, table_of_loops
from tests.methods import WITH_DORA

ROOT = Path(__file__).parents[1]


# Without these packages, the tests whose names have this part are skipped, mostly whole files.
SKIPPED_WITHOUT = {
    "deepspeed": "test_deepspeed",
    "trl": "test_trl_",
    "pytorch_lightning": "test_lightning",
    "schedulefree": "schedule_free",
    "bitsandbytes": "8bit",
}


class Collected:
    """The names of all tests in some files."""

    def __init__(self) -> None:
        self.names: set[str] = set()

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        self.names |= {item.nodeid for item in items}


def test_the_page_has_the_tables() -> None:
    page = (ROOT / "docs" / "compatibility.md").read_text(encoding="utf-8")
    assert table() in page, "python -m tests.compatibility prints the table as it is now"
    assert table_of_loops() in page, "python -m tests.compatibility prints the table as it is now"


def test_every_method_has_a_row() -> None:
    assert set(ROWS) == set(WITH_DORA) - {"alora-retry"}  # a setting of ALoRA's


def test_every_cell_is_backed() -> None:
    tests = [cell.test for cell in [*cells().values(), *LOOPS.values()] if "::" in cell.test]
    files = {test.partition("::")[0] for test in tests}
    collected = Collected()
    arguments = ["--collect-only", "--all", "-q", "-p", "no:cacheprovider"]
    code = pytest.main([*arguments, *(str(ROOT / file) for file in files)], plugins=[collected])
    assert code == 0
    for package, part in SKIPPED_WITHOUT.items():
        if importlib.util.find_spec(package) is None:
            tests = [test for test in tests if part not in test]
    missing = sorted(set(tests) - collected.names)
    assert not missing, missing
    for cell in cells().values():
        if "::" not in cell.test:
            file, _, row = cell.test.partition(": ")
            assert row in (ROOT / file).read_text(encoding="utf-8"), cell
