"""A small Trainer run that is killed and goes on:  python -m tests.training.trainer_run FOLDER STEP

Three processes, one after the other, forked from one that has imported everything: one that is not disturbed, in
``FOLDER/straight``; one in ``FOLDER/killed`` that sends itself SIGKILL at the end of STEP (no handler runs, nothing is
flushed); one that goes on from there. Each that ends writes ``result.json`` with every step's loss and the ranks.
Prints how the three ended: 0, or -9 for the signal.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

import lorank
from tests.models import adapted, tiny_llama, token_batch


class Kill(TrainerCallback):
    def __init__(self, step: int | None) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def rows(count: int, seed: int) -> list[dict[str, torch.Tensor]]:
    batch = token_batch(count, seed=seed)
    return [{key: value[i] for key, value in batch.items()} for i in range(count)]


def make_trainer(output: Path, kill_at: int | None = None, **changes: Any) -> Trainer:
    torch.set_num_threads(1)
    torch.manual_seed(11)
    settings = {
        "output_dir": str(output),
        "per_device_train_batch_size": 4,
        "num_train_epochs": 3,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_steps": 3,
        "save_total_limit": None,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 7,
    }
    allocator = lorank.ALoRA(k1=0.25, k2=0.5, rounds=5, per_round=9, unit="epochs")
    return Trainer(
        model=adapted(tiny_llama(), random_B=False, lora_dropout=0.1),
        args=TrainingArguments(**{**settings, **changes}),
        train_dataset=rows(16, seed=0),
        eval_dataset=rows(8, seed=1),
        callbacks=[lorank.RankCallback(allocator, validation_batch=rows(6, seed=2)), Kill(kill_at)],
    )


def run(output: Path, *, resume: bool = False, kill_at: int | None = None) -> None:
    trainer = make_trainer(output, kill_at)
    trainer.train(resume_from_checkpoint=resume or None)
    result = {
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "norms": [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry],
        "ranks": lorank.find_layers(trainer.model).ranks,
        "history": [record.step for record in lorank.read_history(output / "rank_history.jsonl")],
    }
    (output / "result.json").write_text(json.dumps(result))


def forked(output: Path, **options: Any) -> int | None:
    process = multiprocessing.get_context("fork").Process(target=run, args=(output,), kwargs=options)
    process.start()
    process.join()
    return process.exitcode


def main() -> None:
    folder, step = Path(sys.argv[1]), int(sys.argv[2])
    ends = [forked(folder / "straight"), forked(folder / "killed", kill_at=step)]
    if (folder / "killed" / "result.json").exists():
        raise SystemExit("the run that was to be killed has come to its end")
    print(*ends, forked(folder / "killed", resume=True), file=sys.__stdout__)


if __name__ == "__main__":
    main()
