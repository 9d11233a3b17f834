"""`lorank train --dry-run`: everything that a run does before its first step, and nothing that stays."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import set_seed

from lorank.config.settings import FullSettings, RunConfig
from lorank.experiments.adapted_model import adapted_model, size_of, spread_ranks
from lorank.experiments.models import load_task
from lorank.experiments.run import total_steps, training_arguments
from lorank.lora import base_parameters, find_layers
from lorank.tasks import Task
from lorank.training import attach

START_BATCHES = 4


def dry_run(config: RunConfig) -> dict[str, Any]:
    """Checks a configuration as the run itself does, and says what the run would be. No file is written.

    Model and data are loaded, the adapter is made, the method is attached (which tries its scores on a small part), and
    one batch runs forward and backward, twice, to estimate the time.

    Args:
        config: the run.

    Returns:
        JSON-serialisable: ``examples``, ``steps``, ``evaluations``, ``base_parameters``, ``made`` and ``start`` (ranks,
        modules, trainable parameters: as made, and when the method has begun), ``budget`` (per unit, used at the start
        and the limit), ``allocations`` (the steps after which ranks move) and ``seconds_per_step`` (without scoring and
        evaluation).

    Raises:
        LorankError: as for the run itself.
    """
    task = load_task(config.model, config.task)
    if task.has_test:
        _ = task.test
    settings = config.training
    set_seed(settings.seed)
    model = adapted_model(config, task)
    made = size_of(model)
    spread_ranks(config, task, model)
    steps = total_steps(settings, len(task.train))
    training_arguments(config, len(task.train))
    found: dict[str, Any] = {
        "examples": {"train": len(task.train), "validation": len(task.validation)},
        "steps": steps,
        "evaluations": steps // settings.eval_steps,
        "base_parameters": base_parameters(model),
        "made": made,
        "start": made,
        "budget": None,
        "allocations": [],
    }
    if isinstance(config.allocator, FullSettings):
        found["seconds_per_step"] = _seconds_per_step(config, task, model)
        return found
    allocator = config.allocator.build()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    samples = config.allocator_samples or allocator.validation_samples
    with _without_log():
        ranks = attach(
            model,
            torch.optim.AdamW(trained, lr=settings.lr),
            allocator,
            total_steps=steps,
            validation_batch=task.collator(task.validation[:samples]),
            train_batches=lambda: list(_batches(config, task)),
            seed=settings.seed,
            progress=False,
            fused=settings.fused,
        )
        try:
            found["start"] = size_of(model)
            found["budget"] = None if ranks.budget is None else ranks.budget.used(find_layers(model).ranks)
            found["allocations"] = list(allocator.schedule(ranks.info))
            found["seconds_per_step"] = _seconds_per_step(config, task, model)
        finally:
            ranks.detach()
    return found


def _batches(config: RunConfig, task: Task) -> Iterator[Any]:
    size = config.training.batch_size
    for start in range(0, min(len(task.train), START_BATCHES * size), size):
        yield task.collator(task.train[start : start + size])


def _seconds_per_step(config: RunConfig, task: Task, model: torch.nn.Module) -> float:
    """The duration of the forward and backward passes of one step, measured on the second batch of two."""
    batch = next(_batches(config, task))
    model.train()
    seconds = 0.0
    for _ in range(2):
        began = time.perf_counter()
        model(**batch).loss.backward()
        seconds = time.perf_counter() - began
    return seconds * config.training.gradient_accumulation


@contextmanager
def _without_log() -> Iterator[None]:
    """The lines of a run that begins and ends would be of a run that does not take place."""
    logger = logging.getLogger("lorank")
    logger.addFilter(refuse := lambda record: record.levelno >= logging.ERROR)
    try:
        yield
    finally:
        logger.removeFilter(refuse)
