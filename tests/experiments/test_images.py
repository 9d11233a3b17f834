"""Recipes on images: the packaged vision transformer learns scikit-learn's digits, and ranks move in plain PEFT."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification, ViTForImageClassification

from lorank import read_history
from lorank.config.settings import RunConfig, make_config
from lorank.experiments import train
from lorank.experiments.adapted_model import adapted_model, spread_ranks
from lorank.experiments.adapter_session import load_finished
from lorank.experiments.compare.example_losses import example_losses
from lorank.experiments.dry_run import dry_run
from lorank.experiments.errors import ModelError, SettingsError
from lorank.experiments.models import load_model, load_task, resolve
from lorank.lora import find_layers
from lorank.tasks import mean_loss


def config_of(folder: Path, allocator: Any, **changes: Any) -> RunConfig:
    """A run of twelve steps."""
    values = {
        "model": {"name": "tiny_vit"},
        "lora": {"r": 2, "alpha": 4},
        "task": {"name": "image_classification", "data": "digits", "max_eval": 64},
        "allocator": allocator,
        "allocator_samples": 16,
        "training": {"max_steps": 12, "batch_size": 16, "lr": 3e-3, "eval_steps": 6},
        "output_dir": str(folder / "run"),
    }
    return make_config(
        {key: {**values.get(key, {}), **changes.get(key, {})} if key in changes else values[key] for key in values}
    )


METHODS = {
    "balanced": {"name": "balanced"},
    "alora": {"name": "alora", "k1": 3, "k2": 4, "rounds": 2, "unit": "steps", "per_round": 8},
}


@pytest.mark.parametrize("method", METHODS)
def test_ranks_move_and_the_adapter_is_plain_peft(tmp_path: Path, method: str) -> None:
    config = config_of(tmp_path, METHODS[method], training={"load_best_model_at_end": False})
    result = train(config)
    metrics, out = result.metrics, result.folder
    assert metrics["ranks_moved"] > 0
    assert metrics["start"]["modules"] == 36, "six linear maps in six layers: the head has no adapter"
    assert metrics["validation"]["loss_after"] < metrics["validation"]["loss_before"]
    assert set(metrics["test"]) == {"loss", "accuracy"}
    ranks = read_history(out / "rank_history.jsonl")[-1].ranks
    assert len(set(ranks.values())) > 1

    task = load_task(config.model, config.task)
    base = AutoModelForImageClassification.from_pretrained(
        resolve("tiny_vit"), num_labels=10, ignore_mismatched_sizes=True
    )
    loaded = PeftModel.from_pretrained(base, str(out / "adapter"))
    assert task.evaluate(loaded, "test", progress=False) == pytest.approx(metrics["test"], abs=1e-5)
    # the head is new, and in the adapter's file
    saved = load_file(out / "adapter" / "adapter_model.safetensors")
    assert [tuple(value.shape) for name, value in saved.items() if "classifier.weight" in name] == [(10, 96)]

    session = load_finished(out)
    assert session.layers.ranks == find_layers(loaded).ranks
    session = load_finished(out / "adapter", data="digits")
    assert session.config.task.name == "image_classification"
    assert task.evaluate(session.model, "test", progress=False) == pytest.approx(metrics["test"], abs=1e-5)


def test_full_fine_tuning_ends_with_the_best_checkpoint(tmp_path: Path) -> None:
    """transformers writes a vision transformer's weights with other names than it has in memory."""
    config = config_of(tmp_path, {"name": "full"}, training={"lr": 0.1, "max_steps": 4, "eval_steps": 1})
    result = train(config)
    log = [json.loads(line) for line in (result.folder / "log_history.jsonl").read_text().splitlines()]
    losses = [entry["eval_loss"] for entry in log if "eval_loss" in entry]
    assert result.metrics["best_step"] < 4, "training diverges, so that another checkpoint is the best"
    assert result.metrics["validation"]["loss_after"] == pytest.approx(min(losses), abs=1e-4)
    assert result.metrics["final"]["trainable_parameters"] > 600_000


@pytest.mark.parametrize("spread", ["gradient", "eva"])
@pytest.mark.filterwarnings("ignore:lora with eva initialization:UserWarning")  # PEFT's advice on memory
def test_ranks_from_data(tmp_path: Path, spread: str) -> None:
    config = config_of(tmp_path, {"name": "static"}, lora={"initial_ranks": spread})
    task = load_task(config.model, config.task)
    model = adapted_model(config, task)
    spread_ranks(config, task, model)
    ranks = find_layers(model).ranks
    assert len(set(ranks.values())) > 1
    assert sum(ranks.values()) == pytest.approx(72, abs=8)


def test_a_dry_run(tmp_path: Path) -> None:
    found = dry_run(config_of(tmp_path, {"name": "balanced"}))
    assert found["examples"] == {"train": 997, "validation": 64}
    assert found["allocations"]
    assert not list(tmp_path.iterdir())


def test_losses_of_images_add_up_to_the_mean_loss(tmp_path: Path) -> None:
    config = config_of(tmp_path, {"name": "static"})
    task = load_task(config.model, config.task)
    torch.manual_seed(0)
    model = load_model(config.model, task)
    found = example_losses(model, task.test, task, batch_size=24)
    assert len(found["losses"]) == 64
    assert found["losses"].mean() == pytest.approx(
        mean_loss(model, task.test, task.collator, batch_size=32, progress=False), abs=1e-5
    )
    assert found["correct"].mean() == task.evaluate(model, "test", progress=False)["accuracy"]
    assert len(set(found["groups"])) == 64


def test_the_packaged_model_knows_digits_before_it_has_seen_one(tmp_path: Path) -> None:
    config = config_of(tmp_path, {"name": "static"}, task={"max_eval": 400})
    task = load_task(config.model, config.task)
    model = ViTForImageClassification.from_pretrained(resolve("tiny_vit")).eval()
    assert model.dtype == torch.float32
    assert [model.config.id2label[number] for number in range(12)] == list("0123456789AB")
    batch = task.collator(task.validation)
    with torch.no_grad():
        found = model(pixel_values=batch["pixel_values"]).logits[:, :10].argmax(1)  # (images, 36) → (images,)
    assert (found == batch["labels"]).float().mean() > 0.6


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"task": {"image_size": 16}}, SettingsError, "set task.channels: 1 and task.image_size: 8"),
        ({"task": {"channels": 3}}, SettingsError, "set task.channels: 1"),
        ({"model": {"name": "tiny"}}, ModelError, "model for image_classification of 'tiny' cannot be loaded"),
        (
            {"task": {"name": "language_modelling", "data": "python_reference"}},
            ModelError,
            "tokenizer of 'tiny_vit' cannot be loaded",
        ),
    ],
)
def test_models_and_tasks_that_do_not_fit(
    tmp_path: Path, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    config = config_of(tmp_path, {"name": "static"}, **changes)
    with pytest.raises(error, match=message):
        train(config)
    assert not Path(config.output_dir).exists()
