"""What the processes of ``processes_cases`` saw, run once for all files. Other files may have runs of their own."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from tests.once import once
from tests.one_more import DDP, FSDP
from tests.training.parallel.processes_cases import CASES, HALF
from tests.training.parallel.processes_run import Case, Seen, launch, launched, run


@pytest.fixture(scope="session")
def cases(request: pytest.FixtureRequest) -> dict[str, Case]:
    """The cases whose tests run."""
    wanted = {item.callspec.params.get("name") for item in request.session.items if hasattr(item, "callspec")}
    return {name: case for name, case in CASES.items() if name not in (*DDP, *FSDP) or name in wanted}


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory, cases: dict[str, Case]) -> Path:
    """Where all cases have run in two processes."""

    def make(folder: Path) -> None:
        run(Case("alora", "none", stop=HALF, file="alone.pt"), folder, index=0, count=1)
        launch(folder, list(cases.values()), count=2)

    return once(tmp_path_factory, "processes", make)


@pytest.fixture(scope="session")
def seen(folder: Path, cases: dict[str, Case]) -> dict[str, list[Seen]]:
    """What each of the two saw."""
    return dict(zip(cases, launched(folder, count=2), strict=True))


@pytest.fixture(scope="session")
def alone(folder: Path) -> Callable[..., Seen]:
    """What one process sees, with the same global batch."""

    @cache
    def seen_alone(method: str, accumulate: int = 2, dora: bool = False) -> Seen:
        return run(Case(method, "none", accumulate=accumulate, dora=dora), folder, index=0, count=1)

    return seen_alone
