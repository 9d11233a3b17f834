"""The runs of a comparison on the task of a recipe: each trains one adapter, and measures it where it is.

A run keeps no checkpoint and writes no adapter: the comparison needs only what it measures. A process reads the data
and encodes them once, for all its runs.
"""

from __future__ import annotations

import gc
import hashlib
import itertools
import json
import logging
import math
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments, set_seed
from transformers.utils.logging import disable_progress_bar

from lorank.allocators import Budget, truncate_
from lorank.config.settings import ConfigError, FullSettings, RunConfig, make_config
from lorank.errors import BudgetError, LorankError, ScheduleError
from lorank.experiments.adapted_model import adapted_model, spread_ranks
from lorank.experiments.compare.example_losses import example_losses
from lorank.experiments.errors import ModelError, SettingsError
from lorank.experiments.models import load_task
from lorank.experiments.run import make_trainer, total_steps, training_arguments
from lorank.experiments.study.tuning import Stage
from lorank.extras import MissingPackageError
from lorank.files import replacing_file
from lorank.lora import find_layers
from lorank.tasks import DataError, Task, mean_loss
from lorank.training import RankCallback

LOSSES = "losses"
"""The subfolder with the losses of every test example, one file per test run."""

CUT_SAMPLES = 128
"""Training examples on which Gramians are measured for a cut at the end."""

_MISTAKES = (ConfigError, ModelError, SettingsError, DataError, ScheduleError, BudgetError, MissingPackageError)
"""Errors that say that the comparison itself is wrong. They end it; any other of lorank's errors is a run's result."""


@dataclass(frozen=True)
class RecipeTrial:
    """One run.

    Args:
        method: its key in the file.
        budget: the budget as it is told to users.
        config: the configuration as JSON, without defaults, its folder, learning rate and seed.
        cut: the numbers in A and B to which the trained adapter is cut at the end; None: it is not cut.
        forgetting: the settings of the task that shows what is forgotten, as JSON; None: there is none.
        failure: why the trial cannot be done; None: it can.
    """

    method: str
    budget: str
    lr: float
    seed: int
    stage: Stage
    config: str = field(repr=False)
    cut: int | None = None
    forgetting: str | None = field(default=None, repr=False)
    failure: str | None = None

    @cached_property
    def fingerprint(self) -> str:
        """A hash of all that decides the result."""
        more = [value for value in (self.cut, self.forgetting, self.failure) if value is not None]
        described = json.dumps([self.config, self.lr, self.seed, self.stage, *more])
        return hashlib.sha256(described.encode()).hexdigest()[:16]

    @property
    def label(self) -> str:
        """The run in a few words."""
        return f"{self.method}, budget {self.budget}, lr {self.lr:g}, seed {self.seed}, {self.stage}"

    @property
    def kind(self) -> str:
        """Runs of one method and budget take about the same time."""
        return f"{self.method} {self.budget}"

    def run_config(self, folder: str) -> RunConfig:
        """The configuration of the run, with a folder."""
        values = json.loads(self.config)
        values["training"] |= {"lr": self.lr, "seed": self.seed}
        return make_config({**values, "output_dir": folder})


def config_text(config: RunConfig) -> str:
    """A configuration for :class:`RecipeTrial`. Keys that do not matter here are left out, so that they do not make
    another trial: there are no checkpoints, and the weights after the last step are measured. Defaults are left out
    too, so that a key that a later version adds does not make another trial."""
    values = config.model_dump(mode="json", exclude={"output_dir"}, exclude_defaults=True)
    training = values.setdefault("training", {})
    for key in ("lr", "seed", "eval_steps", "save_steps", "keep_checkpoints", "logging_steps", "patience"):
        training.pop(key, None)
    training["load_best_model_at_end"] = False
    values["task"]["name"] = config.task.name  # it says which settings these are
    return json.dumps(values, sort_keys=True)


@lru_cache(maxsize=4)
def _task(model: str, task: str) -> Task:
    config = make_config(
        {"model": json.loads(model), "task": json.loads(task), "allocator": {"name": "static"}, "output_dir": "-"}
    )
    return load_task(config.model, config.task)


def task_of(config: RunConfig) -> Task:
    """The task of a configuration, read once per process."""
    return _task(json.dumps(config.model.model_dump(mode="json")), json.dumps(config.task.model_dump(mode="json")))


def other_task(config: RunConfig, settings: str) -> Task:
    """The task that shows what is forgotten, from its settings as JSON, read once per process."""
    return _task(json.dumps(config.model.model_dump(mode="json")), settings)


def run_trial(trial: RecipeTrial, out: Path) -> dict[str, Any]:
    """Trains and measures one adapter, and returns its line of results.

    A method that fails on purpose, such as one that diverged, is a result: its losses are None, and ``failure`` says
    why. So is a NaN or infinite loss.

    Args:
        trial: the run.
        out: the folder of the comparison, which receives the losses of test examples.
    """
    logging.getLogger("lorank").setLevel(logging.ERROR)
    disable_progress_bar()  # type: ignore[no-untyped-call]  # it has no annotations
    line: dict[str, Any] = {
        "method": trial.method,
        "budget": trial.budget,
        "lr": trial.lr,
        "seed": trial.seed,
        "stage": trial.stage,
        "failure": None,
    }
    if trial.failure is not None:
        return {**line, "failure": trial.failure, "validation_loss": None, "test": {}, "seconds": 0.0}
    gc.collect()  # a Trainer and its callbacks refer to each other: without it, two models would be in memory
    began = time.perf_counter()
    try:
        with tempfile.TemporaryDirectory() as folder:
            config = trial.run_config(folder)
            task = task_of(config)
            line |= {"task": config.task.data, **_train_and_measure(config, task, trial, out)}
    except _MISTAKES:
        raise
    except (LorankError, torch.linalg.LinAlgError) as error:  # type: ignore[attr-defined]  # it is documented
        line |= {"failure": f"{type(error).__name__}: {error}", "validation_loss": None, "test": {}}
    return {**line, "seconds": time.perf_counter() - began}


def _train_and_measure(config: RunConfig, task: Task, trial: RecipeTrial, out: Path) -> dict[str, Any]:
    batch = config.training.eval_batch_size
    tuning = trial.stage == "tuning"
    other = None if tuning or trial.forgetting is None else other_task(config, trial.forgetting)
    set_seed(config.training.seed)
    model = adapted_model(config, task)
    measured: dict[str, Any] = {}
    if other is not None:
        measured["other_loss_before"] = _validation_loss(model, other, batch)
    if isinstance(config.allocator, FullSettings) and not tuning:  # so that others can be told as parts of its gain
        untrained = mean_loss(model, task.test, task.collator, batch_size=batch, progress=False)
        measured["untrained_loss"] = _finite(untrained)
    callback, trained = train_(model, config, task)
    if callback is None:
        measured |= {"parameters": sum(p.numel() for p in model.parameters() if p.requires_grad), "ranks": None}
        measured |= {"most_parameters": measured["parameters"], "allocation_seconds": 0.0}
    else:
        measured |= _of_ranks(model, callback, config, task, trial.cut)
    measured |= {"training_seconds": trained}
    measured["validation_loss"] = _validation_loss(model, task, batch)
    if tuning:
        return {**measured, "test": {}}
    if other is not None:
        measured["other_loss"] = _validation_loss(model, other, batch)
    test = task.evaluate(model, "test", batch_size=batch, progress=False)
    examples = example_losses(model, task.test, task, batch_size=batch)
    with replacing_file(out / LOSSES / f"{trial.fingerprint}.npz") as path, path.open("wb") as file:
        np.savez_compressed(file, **examples)  # type: ignore[arg-type]  # its other arguments have defaults
    return {**measured, "test": {name: _finite(value) for name, value in test.items()}}


def _validation_loss(model: nn.Module, task: Task, batch: int) -> float | None:
    return _finite(mean_loss(model, task.validation, task.collator, batch_size=batch, progress=False))


def _of_ranks(
    model: nn.Module, callback: RankCallback, config: RunConfig, task: Task, cut: int | None
) -> dict[str, Any]:
    """What a line holds of the ranks. Cuts the adapter before, if the trial says so."""
    assert callback.ranks is not None
    layers, records = find_layers(model), callback.ranks.history
    most = max([layers.parameters, *(record.parameters for record in records)])
    seconds = sum(record.seconds for record in records.allocations)
    if cut is not None:
        began = time.perf_counter()
        budget = Budget(parameters=cut).resolve(layers, layers.ranks)
        examples, batch = task.train[:CUT_SAMPLES], config.training.batch_size
        parts = [examples[start : start + batch] for start in range(0, len(examples), batch)]
        truncate_(model, layers, [task.collator(part) for part in parts], budget)
        seconds += time.perf_counter() - began
    return {
        "parameters": layers.parameters,
        "most_parameters": most,
        "ranks": layers.ranks,
        "steps": callback.ranks.step,
        "allocation_seconds": seconds,
    }


def train_(
    model: nn.Module, config: RunConfig, task: Task, callbacks: Sequence[TrainerCallback] = ()
) -> tuple[RankCallback | None, float]:
    """Trains a model as :func:`adapted_model` made it, without checkpoints.

    Returns:
        (the callback that moved the ranks, None for full fine-tuning; seconds).
    """
    spread_ranks(config, task, model)
    callback = None if isinstance(config.allocator, FullSettings) else _rank_callback(config, task)
    arguments = training_arguments(config, len(task.train), checkpoints=False)
    trainer = make_trainer(config, arguments, task, model, [*([callback] if callback else []), *callbacks])
    began = time.perf_counter()
    trainer.train()
    return callback, time.perf_counter() - began


def _rank_callback(config: RunConfig, task: Task) -> RankCallback:
    assert not isinstance(config.allocator, FullSettings)
    allocator = config.allocator.build()
    samples = config.allocator_samples or allocator.validation_samples
    return RankCallback(
        allocator,
        validation_batch=task.collator(task.validation[:samples]),
        seed=config.training.seed,
        progress=False,
        fused=config.training.fused,
    )


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def selection_loss(line: Mapping[str, Any]) -> float:
    """The validation loss in a line; infinite for a run that failed."""
    loss = line["validation_loss"]
    return math.inf if loss is None else float(loss)


def seconds_per_run(config: RunConfig, steps: int = 12) -> float:
    """An estimate from a few steps of training, the first ones not counted, and an evaluation of a few examples."""
    task, clock = task_of(config), _Clock()
    with tempfile.TemporaryDirectory() as folder:
        training = config.training.model_copy(update={"max_steps": steps, "epochs": 1e6, "patience": None})
        short = config.model_copy(update={"output_dir": folder, "training": training})
        set_seed(config.training.seed)
        model = adapted_model(short, task)
        train_(model, short, task, [clock])
    step = statistics.median(after - before for before, after in itertools.pairwise(clock.times[steps // 3 :]))
    batch = config.training.eval_batch_size
    sample, began = task.validation[: 2 * batch], time.perf_counter()
    mean_loss(model, sample, task.collator, batch_size=batch, progress=False)
    evaluation = (time.perf_counter() - began) / len(sample) * len(task.validation)
    return step * total_steps(config.training, len(task.train)) + evaluation


class _Clock(TrainerCallback):
    """The time at the end of every step."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.times.append(time.perf_counter())
