"""A finished adapter, its base model and data to judge it by, from as little as the user must say."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from torch import nn
from transformers import set_seed

from lorank.config.settings import ConfigError, RunConfig, load_config, make_config
from lorank.experiments import folder
from lorank.experiments.errors import ModelError
from lorank.experiments.models import load_model, load_tokenizer
from lorank.lora import AdapterLayers, find_layers, load_adapter, read_adapter_config
from lorank.tasks import Example, Task, build_task, mean_loss
from lorank.tasks.known import KNOWN

MAX_EVAL = 512
"""Validation examples that are read where neither a configuration nor the user says how many."""
T = TypeVar("T")


@dataclass(frozen=True)
class LoadedAdapter:
    """A finished adapter on its base model, with data to judge it by."""

    adapter: Path
    config: RunConfig
    model: nn.Module
    layers: AdapterLayers
    task: Task

    @property
    def batch_size(self) -> int:
        return self.config.training.eval_batch_size

    def held_apart(self, samples: int) -> list[Example]:
        """Validation examples that ranks are not scored on; all of them, where scoring takes them all."""
        return self.task.validation[samples:] or self.task.validation

    def loss(self, samples: int, *, progress: bool = False) -> float:
        """Mean loss on the examples held apart."""
        examples = self.held_apart(samples)
        return mean_loss(self.model, examples, self.task.collator, batch_size=self.batch_size, progress=progress)


def load_finished(
    adapter: str | Path,
    *,
    data: str | None = None,
    task: str | None = None,
    model: str | None = None,
    config: str | Path | None = None,
    overrides: Sequence[str] = (),
) -> LoadedAdapter:
    """Loads an adapter, its base model and the data to judge it by.

    Args:
        adapter: a folder with a plain PEFT LoRA adapter, or the folder of a finished `lorank train`.
        data: a known name, a path or a hub name, as in a configuration's `task.data`. Not needed with a configuration,
            and for adapters inside a run's folder, whose own configuration is taken.
        task: classification, generation or language_modelling; default: what the adapter and the data are for.
        model: the base model; default: the one that the adapter names.
        config: a configuration to take model and task from.
        overrides: `dotted.key=value`, as for `lorank train`.

    Raises:
        AdapterError: it is not a LoRA adapter, or not one of this model.
        ConfigError, DataError, ModelError, SettingsError: the model or the data cannot be used.
    """
    path = Path(adapter)
    if (path / folder.CONFIG).is_file() and (path / folder.ADAPTER).is_dir():
        path, config = path / folder.ADAPTER, config or (None if data else path / folder.CONFIG)
    saved = read_adapter_config(path)
    inside = path.resolve().parent / folder.CONFIG
    if config is None and data is None and inside.is_file():
        config = inside
    settings = _settings(saved, data, task, model, config, overrides)
    tokenizer = _with_hint(lambda: load_tokenizer(settings.model), model)
    # nothing is trained: one training example is as good as all
    built = build_task(settings.task.model_copy(update={"max_train": 1}), tokenizer)
    set_seed(settings.training.seed)
    base = _with_hint(lambda: load_model(settings.model, built), model)
    opened = load_adapter(base, path)
    return LoadedAdapter(path, settings, opened, find_layers(opened), built)


def _settings(
    saved: Mapping[str, Any],
    data: str | None,
    task: str | None,
    model: str | None,
    config: str | Path | None,
    overrides: Sequence[str],
) -> RunConfig:
    name = model or saved.get("base_model_name_or_path")
    if config is not None:
        if data is not None or task is not None:
            raise ConfigError(f"--config {config} says what the data are: give it, or --data and --task")
        # JSON is YAML, so that any name can be an override
        other_model = [] if model is None else [f"model={json.dumps({'name': model})}"]
        return load_config(config, [*other_model, *overrides])
    if data is None:
        raise ConfigError(
            "no data to judge the ranks by: give --data (a known name such as e2e_nlg, a path or a hub name), --config "
            "(the configuration of a run), or the folder of a finished lorank train"
        )
    if not name:
        raise ModelError("the adapter does not name its base model: give --model")
    values = {
        "model": {"name": str(name)},
        "task": {"name": task or _kind(saved, data, overrides), "data": data, "max_eval": MAX_EVAL},
        "allocator": {"name": "static"},
        "output_dir": "-",
    }
    return make_config(values, overrides, source="options")


def _kind(saved: Mapping[str, Any], data: str, overrides: Sequence[str]) -> str:
    """What the adapter and the data are for, where the user does not say."""
    if saved.get("task_type") == "SEQ_CLS":
        return "classification"
    prompted = data in KNOWN and "prompt" in KNOWN[data].defaults
    prompted = prompted or any(override.startswith("task.prompt=") for override in overrides)
    return "generation" if prompted else "language_modelling"


def _with_hint(load: Callable[[], T], model: str | None) -> T:
    try:
        return load()
    except ModelError as error:
        if model is not None:
            raise
        raise ModelError(f"{error} The adapter names this model; --model names another one.") from error
