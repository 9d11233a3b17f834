"""A small sentiment task in files and a configuration for it that trains in seconds."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoTokenizer

from lorank.config.settings import RunConfig, make_config
from lorank.experiments.models import resolve
from tests.models import tiny_llama


@pytest.fixture(autouse=True)
def no_data_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LORANK_DATA", raising=False)


@pytest.fixture(scope="session")
def sentiment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows that the word in the middle decides."""
    folder = tmp_path_factory.mktemp("sentiment")
    draw = random.Random(0)
    words = ["good", "great", "bad", "poor"]
    for split, count in {"train": 64, "validation": 24, "test": 16}.items():
        rows = []
        for _ in range(count):
            word = draw.choice(words)
            rows.append({"text": f"a very {word} film", "label": int(word in ("good", "great"))})
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two random layers with the tokenizer of the packaged model, saved as a user's own model would be."""
    folder = tmp_path_factory.mktemp("model")
    tiny_llama(vocab_size=4096, max_position_embeddings=256, pad_token_id=2, eos_token_id=1).save_pretrained(folder)
    AutoTokenizer.from_pretrained(resolve("tiny")).save_pretrained(folder)
    return folder


@pytest.fixture
def values(sentiment: Path, model_folder: Path, tmp_path: Path) -> dict[str, Any]:
    """Twelve steps, two allocations (after steps 3 and 7), evaluations and checkpoints after 4, 8 and 12."""
    return {
        "model": {"name": str(model_folder)},
        "lora": {"r": 4, "alpha": 8, "target_modules": ["q_proj", "v_proj"]},
        "task": {"name": "classification", "data": str(sentiment)},
        "allocator": {"name": "alora", "k1": 3, "k2": 4, "rounds": 2, "unit": "steps", "per_round": 2},
        "allocator_samples": 4,
        "training": {"epochs": 3, "max_steps": 12, "batch_size": 4, "lr": 3e-3, "eval_steps": 4, "logging_steps": 2},
        "output_dir": str(tmp_path / "run"),
    }


@pytest.fixture
def make(values: dict[str, Any]) -> Callable[..., RunConfig]:
    """The configuration with changes: `make(training={"lr": 1})` replaces one key of one section."""

    def build(**changes: Any) -> RunConfig:
        merged = {
            key: {**values[key], **change} if isinstance(change, dict) and "name" not in change else change
            for key, change in changes.items()
        }
        return make_config({**values, **merged})

    return build


@pytest.fixture
def recipe(values: dict[str, Any], tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return path
