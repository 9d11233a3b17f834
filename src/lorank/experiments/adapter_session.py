"""Loading a trained adapter with its base model and the data to score it on, from as few settings as possible."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from lorank.config.settings import ConfigError, RunConfig, load_config, make_config
from lorank.experiments import folder
from lorank.experiments.adapter_folder import adapter_of_run
from lorank.experiments.errors import ModelError
from lorank.experiments.models import load_onto_new_base, load_task
from lorank.lora import AdapterLayers, find_layers, read_adapter_config
from lorank.tasks import Example, Task, mean_loss
from lorank.tasks.known import KNOWN

MAX_EVAL = 512
"""Number of validation examples, if neither a configuration nor the user sets it."""
T = TypeVar("T")


@dataclass(frozen=True)
class LoadedAdapter:
    """A trained adapter on its base model, with the data to score it on.

    Args:
        adapter: the adapter's folder.
        config: model, task and batch sizes.
        model: the base model with the adapter.
        layers: its LoRA layers.
        task: the data, with their metrics.
    """

    adapter: Path
    config: RunConfig
    model: nn.Module
    layers: AdapterLayers
    task: Task

    @property
    def batch_size(self) -> int:
        return self.config.training.eval_batch_size

    def held_apart(self, samples: int) -> list[Example]:
        """The validation examples that are not used for scoring; all examples if scoring uses all of them.

        Args:
            samples: number of examples that scoring uses.
        """
        return self.task.validation[samples:] or self.task.validation

    def loss(self, samples: int, *, progress: bool = False) -> float:
        """Mean loss on the examples of `held_apart`, in nats per predicted label."""
        examples = self.held_apart(samples)
        return mean_loss(self.model, examples, self.task.collator, batch_size=self.batch_size, progress=progress)

    def reload(self, adapter: Path) -> LoadedAdapter:
        """Loads another adapter of the same base model from its files, onto a base model that is loaded anew."""
        model = load_onto_new_base(self.config.model, self.task, adapter, seed=self.config.training.seed)
        return replace(self, adapter=adapter, model=model, layers=find_layers(model))


def load_finished(
    adapter: str | Path,
    *,
    data: str | None = None,
    task: str | None = None,
    model: str | None = None,
    config: str | Path | None = None,
    overrides: Sequence[str] = (),
) -> LoadedAdapter:
    """Loads an adapter, its base model and the data to score it on.

    Args:
        adapter: a folder with a plain PEFT LoRA adapter, or the folder of a finished `lorank train`.
        data: a known name, a path or a hub name, as in a configuration's `task.data`. Not needed with a configuration,
            nor for an adapter inside a run's folder: the configuration of the run is used.
        task: classification, generation, language_modelling or image_classification; default: from the adapter and
            the data.
        model: the base model; default: the model named in the adapter.
        config: a configuration with model and task.
        overrides: `dotted.key=value`, as for `lorank train`.

    Raises:
        AdapterError: the folder holds no LoRA adapter, or the adapter does not fit this model.
        ConfigError, DataError, ModelError, SettingsError: the model or the data cannot be used.
    """
    path = adapter_of_run(Path(adapter))
    saved = read_adapter_config(path)
    inside = path.resolve().parent / folder.CONFIG
    if config is None and data is None and inside.is_file():
        config = inside
    settings = _settings(saved, data, task, model, config, overrides)
    # no training happens here, so one training example is enough
    few = settings.task.model_copy(update={"max_train": 1})
    built = _with_hint(lambda: load_task(settings.model, few), model)
    loaded = _with_hint(lambda: load_onto_new_base(settings.model, built, path, seed=settings.training.seed), model)
    return LoadedAdapter(path, settings, loaded, find_layers(loaded), built)


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
            raise ConfigError(f"--config {config} already sets the data: give --config, or --data and --task, not both")
        # JSON is YAML, so any name can be written as an override
        other_model = [] if model is None else [f"model={json.dumps({'name': model})}"]
        return load_config(config, [*other_model, *overrides])
    if data is None:
        raise ConfigError(
            "there are no data to score the ranks on: give --data (a known name such as e2e_nlg, a path or a hub "
            "name), --config (the configuration of a run), or the folder of a finished lorank train"
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
    """The kind of task that fits the adapter and the data, if the user does not name one."""
    if saved.get("task_type") == "SEQ_CLS":
        return "classification"
    if data in KNOWN and KNOWN[data].task == "image_classification":
        return "image_classification"
    prompted = data in KNOWN and KNOWN[data].task == "generation"
    prompted = prompted or any(override.startswith("task.prompt=") for override in overrides)
    return "generation" if prompted else "language_modelling"


def _with_hint(load: Callable[[], T], model: str | None) -> T:
    try:
        return load()
    except ModelError as error:
        if model is not None:
            raise
        raise ModelError(f"{error} The adapter names this model; give --model to use another one.") from error
