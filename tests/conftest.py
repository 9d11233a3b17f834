from __future__ import annotations

import pytest
import torch
from hypothesis import settings

# The same examples in every run: a change that breaks nothing must not fail by the draw. Other examples, as many as
# wanted: pytest --hypothesis-profile=default
settings.register_profile("fixed", derandomize=True)
settings.load_profile("fixed")


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)  # tiny models: threads only wait for each other
