from __future__ import annotations

import copy
from typing import Any

import pytest

from tests.training.checkpoint.saved_runs import trained


@pytest.fixture(scope="session")
def checkpoint() -> dict[str, Any]:
    return trained("alora", 4)


@pytest.fixture
def saved(checkpoint: dict[str, Any]) -> dict[str, Any]:
    return copy.deepcopy(checkpoint)
