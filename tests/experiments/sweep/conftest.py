from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml


@pytest.fixture
def write(values: dict[str, Any], tmp_path: Path) -> Callable[..., Path]:
    """A sweep of static runs of two steps, with changes."""

    def build(**changes: Any) -> Path:
        base = {key: value for key, value in values.items() if key != "output_dir"}
        base["allocator"] = {"name": "static"}
        base["training"] = {**base["training"], "max_steps": 2, "eval_steps": 2}
        sweep = {
            "base": base,
            "space": {"lora.r": [1, 2], "training.lr": [1e-05]},
            "seeds": [0, 1],
            "output_dir": str(tmp_path / "sweep"),
        }
        path = tmp_path / "sweep.yaml"
        path.write_text(yaml.safe_dump({**sweep, **changes}, sort_keys=False))
        return path

    return build
