"""One training run from a configuration: model, adapter, task, allocator, Trainer, and results in the run's folder."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback

from lorank._version import __version__
from lorank.config.sections import TrainingSettings
from lorank.config.settings import FullSettings, RunConfig
from lorank.errors import LorankError
from lorank.experiments import folder
from lorank.experiments.adapted_model import adapted_model, size_of, spread_ranks
from lorank.experiments.errors import SettingsError
from lorank.experiments.models import load_model, load_onto_new_base, load_task
from lorank.experiments.progress import TrainingProgress
from lorank.experiments.trainer import RunTrainer
from lorank.files import write_text
from lorank.lora import find_layers, save_adapter
from lorank.tasks import Task, mean_loss
from lorank.training import RankCallback
from lorank.training.summary import moved

logger = logging.getLogger("lorank")


@dataclass(frozen=True)
class RunResult:
    """A finished run.

    Args:
        folder: the run's folder.
        metrics: the content of `metrics.json` (see `docs/recipes.md`).
    """

    folder: Path
    metrics: Mapping[str, Any]


def train(
    config: RunConfig,
    *,
    resume: bool = False,
    overwrite: bool = False,
    console: Console | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> RunResult:
    """Runs a configuration to its end.

    The validation part is used for evaluation while training, for scoring ranks and for choosing the best checkpoint.
    The test split is read at the beginning, so that errors in it show early. It is evaluated once, at the end.

    Args:
        config: the run; `config.output_dir` is the run's folder.
        resume: continue from the last complete checkpoint in that folder.
        overwrite: first remove the run in that folder.
        console: shows the progress; None: standard error.
        callbacks: further callbacks of the Trainer.

    Raises:
        LorankError: the folder, the data or the model cannot be used, or ranks cannot be allocated. The message says
            what to do.
    """
    console = console or Console(stderr=True)
    task = load_task(config.model, config.task)
    if task.has_test:
        _ = task.test  # report a missing split or column now, not after hours of training
    # the new weights of the classifier and of the adapter are drawn from the run's seed
    set_seed(config.training.seed)
    model = adapted_model(config, task)
    spread_ranks(config, task, model)
    started_with = size_of(model)
    arguments = training_arguments(config, len(task.train))
    # after every check of the input: an error above makes no folder and removes no earlier run
    checkpoint = folder.prepare(config, resume=resume, overwrite=overwrite)

    settings = config.training
    batch = settings.eval_batch_size
    before = mean_loss(model, task.validation, task.collator, batch_size=batch, progress=console.is_terminal)
    progress = TrainingProgress(console)
    ranks = progress.ranks = _rank_callback(config, task, progress)
    trainer = make_trainer(config, arguments, task, model, [*([ranks] if ranks else []), progress, *callbacks])
    began = time.perf_counter()
    try:
        with progress:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except LorankError:
        if not checkpoint and not trainer.state.global_step:
            # some settings are checked against the model only when training begins; free the folder for the next try
            folder.abandon(Path(config.output_dir))
        raise
    trained = time.perf_counter() - began

    out = Path(config.output_dir)
    write_text(out / folder.LOG, "".join(f"{json.dumps(entry)}\n" for entry in trainer.state.log_history))
    if ranks:
        about = {**(ranks.ranks.about() if ranks.ranks else {}), "Data": config.task.data}
        save_adapter(find_layers(model), out / folder.ADAPTER, about)
    else:
        trainer.save_model(str(out / folder.FULL_MODEL))
    began, ended_with = time.perf_counter(), size_of(model)
    written = _written_model(config, task, model)  # the metrics are those of the files
    after = mean_loss(written, task.validation, task.collator, batch_size=batch, progress=console.is_terminal)
    test = task.evaluate(written, "test", batch_size=batch, progress=console.is_terminal) if task.has_test else {}
    evaluated = time.perf_counter() - began
    records = ranks.ranks.history.allocations if ranks and ranks.ranks else []
    best_step = trainer.state.best_global_step if settings.load_best_model_at_end else None
    resumed = int(checkpoint.name.rpartition("-")[2]) if checkpoint else None
    metrics = {
        "lorank": __version__,
        "model": config.model.name,
        "data": config.task.data,
        "allocator": config.allocator.name,
        "seed": settings.seed,
        "steps": trainer.state.global_step,
        "best_step": best_step,
        "resumed_from_step": resumed,
        "examples": {"train": len(task.train), "validation": len(task.validation)},
        "start": started_with,
        "final": ended_with,
        "widest": _widest(ranks),
        "budget": _named_budget(ranks),
        "allocations": len(records),
        "ranks_moved": sum(map(moved, records)),
        "note": _note(config, ranks, best_step),
        "validation": {"loss_before": before, "loss_after": after},
        "test": test,
        "seconds": {
            "training": trained,
            "scoring": sum(record.seconds for record in records if record.step > (resumed or 0)),
            "final_evaluation": evaluated,
        },
    }
    write_text(out / folder.METRICS, json.dumps(metrics, indent=2) + "\n")
    return RunResult(out, metrics)


def _written_model(config: RunConfig, task: Task, live: nn.Module) -> nn.Module:
    """The result of a run, loaded from its files onto the device of the live model, which moves to the CPU."""
    out, device = Path(config.output_dir), next(live.parameters()).device
    live.to("cpu")
    if isinstance(config.allocator, FullSettings):
        settings = config.model.model_copy(update={"name": str(out / folder.FULL_MODEL), "revision": None})
        written: nn.Module = load_model(settings, task)
    else:
        written = load_onto_new_base(config.model, task, out / folder.ADAPTER, seed=config.training.seed)
    return written.to(device)


def _rank_callback(config: RunConfig, task: Task, progress: TrainingProgress) -> RankCallback | None:
    """The callback that moves the ranks; None for full fine-tuning, which has no ranks."""
    if isinstance(config.allocator, FullSettings):
        return None
    allocator = config.allocator.build()
    samples = config.allocator_samples or allocator.validation_samples
    return RankCallback(
        allocator,
        validation_batch=task.collator(task.validation[:samples]),
        seed=config.training.seed,
        history_path=Path(config.output_dir) / folder.HISTORY,
        progress=progress.scoring,
        fused=config.training.fused,
    )


def _named_budget(callback: RankCallback | None) -> dict[str, Any] | None:
    """The budget that the configuration names or the method has by default, and how much of it the result uses.

    By unit: the limit and the use. None: there is no budget.
    """
    if callback is None or callback.ranks is None or callback.ranks.budget is None:
        return None
    return callback.ranks.budget.used(callback.ranks.layers.ranks)


def _widest(callback: RankCallback | None) -> dict[str, int] | None:
    """The adapter's size when it was largest; None for full fine-tuning."""
    if callback is None or callback.ranks is None:
        return None
    record = max(callback.ranks.history, key=lambda record: record.parameters)
    return {"step": record.step, "ranks": record.total_rank, "parameters": record.parameters}


def _note(config: RunConfig, callback: RankCallback | None, best_step: int | None) -> str | None:
    """What a reader of the results must know: they say nothing about a method that moved no rank before the result."""
    if callback is None or callback.ranks is None or not callback.allocator.moves_ranks:
        return None
    steps = [record.step for record in callback.ranks.history.allocations if moved(record)]
    name = config.allocator.name
    if not steps:
        note = f"{name} moved no rank in this run, so the results say nothing about the method"
    elif best_step is not None and best_step < steps[0]:
        note = (
            f"the best checkpoint, of step {best_step}, is from before the first allocation of {name}, after step "
            f"{steps[0]}, so the results say nothing about the method"
        )
    else:
        return None
    logger.warning("%s", note)
    return note


def make_trainer(
    config: RunConfig,
    arguments: TrainingArguments,
    task: Task,
    model: nn.Module,
    callbacks: list[TrainerCallback],
) -> Trainer:
    if config.training.patience is not None:
        callbacks = [*callbacks, EarlyStoppingCallback(early_stopping_patience=config.training.patience)]
    trainer = RunTrainer(
        lora_plus=config.training.lora_plus,
        head_lr=config.training.head_lr,
        model=model,
        args=arguments,
        data_collator=task.collator,
        train_dataset=task.train,
        eval_dataset=task.validation,
        callbacks=callbacks,
    )
    # it prints every log as a Python dictionary if transformers' own bar is off
    trainer.remove_callback(PrinterCallback)
    return trainer


def total_steps(settings: TrainingSettings, examples: int) -> int:
    """Optimiser steps of the whole run: the epochs in steps, as the Trainer counts them, or `max_steps` if fewer."""
    batches = math.ceil(examples / settings.batch_size)
    steps = math.ceil(settings.epochs * math.ceil(batches / settings.gradient_accumulation))
    return min(steps, settings.max_steps or steps)


def training_arguments(config: RunConfig, examples: int, *, checkpoints: bool = True) -> TrainingArguments:
    settings = config.training
    checkpointing: dict[str, Any] = {}
    if settings.gradient_checkpointing:
        # transformers renames the setting before version 6
        renamed = "activation_checkpointing" in TrainingArguments.__dataclass_fields__
        key = "activation_checkpointing" if renamed else "gradient_checkpointing"
        # reentrant checkpoints would lose all gradients: the output of the frozen embeddings requires none
        checkpointing = {key: True, f"{key}_kwargs": {"use_reentrant": False}}
    try:
        return TrainingArguments(
            output_dir=config.output_dir,
            max_steps=total_steps(settings, examples),
            per_device_train_batch_size=settings.batch_size,
            per_device_eval_batch_size=settings.eval_batch_size,
            gradient_accumulation_steps=settings.gradient_accumulation,
            learning_rate=settings.lr,
            lr_scheduler_type=settings.scheduler,
            warmup_steps=settings.warmup,
            optim=settings.optimizer,
            weight_decay=settings.weight_decay,
            max_grad_norm=settings.max_grad_norm,
            bf16=settings.bf16,
            eval_strategy="steps" if checkpoints else "no",
            eval_steps=settings.eval_steps,
            save_strategy="steps" if checkpoints else "no",
            save_steps=settings.save_steps or settings.eval_steps,
            save_total_limit=settings.keep_checkpoints,
            load_best_model_at_end=settings.load_best_model_at_end and checkpoints,
            metric_for_best_model="eval_loss",
            greater_is_better=False,
            # a resumed run continues to count the evaluations without a better loss
            restore_callback_states_from_checkpoint=True,
            logging_steps=settings.logging_steps,
            prediction_loss_only=True,
            remove_unused_columns=False,
            label_names=["labels"],
            dataloader_pin_memory=torch.accelerator.is_available(),
            # transformers refuses bf16 on a CPU unless use_cpu is set
            use_cpu=not torch.accelerator.is_available(),
            report_to="none",
            disable_tqdm=True,
            seed=settings.seed,
            **checkpointing,
        )
    except ValueError as error:  # for example bf16 on a GPU that does not support it
        raise SettingsError(f"The training settings do not fit this machine: {error}") from error
