"""Some cases of `python -m tests.fuzz` for every kind of file, and the cases of its past findings."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fuzz import corpus_of, fuzz, judge
from tests.fuzz_kinds import KINDS


@pytest.mark.parametrize("name", KINDS)
def test_damaged_files_are_read_or_refused(name: str, tmp_path: Path) -> None:
    kind = KINDS[name]()
    tally = fuzz(kind, tmp_path, seconds=120, cases=60)  # by count: a crowded machine must not fail it
    assert tally.findings == 0
    assert tally.clean + tally.refused == tally.cases
    assert tally.refused > 0


def test_an_error_that_is_not_ours_is_a_finding(tmp_path: Path) -> None:
    kind = KINDS["history"]()
    case = tmp_path / "case.jsonl"
    case.write_bytes(kind.seeds[0])

    def read(path: Path) -> None:
        raise KeyError(path.name)

    broken = type(kind)(kind.suffix, kind.seeds, kind.damage, read)
    assert "KeyError: 'case.jsonl'" in judge(broken, case)
    assert judge(kind, case) == "clean"
    assert isinstance(corpus_of(kind), list)
