"""Rank allocation in the Trainer with a base model that transformers has sharded (FSDP2), with torchrun.

torchrun --nproc-per-node 2 examples/trainer_fsdp.py

The callback is the only part from lorank. transformers shards the model while it loads it; the adapter stays whole in
every process. In one process nothing is sharded, and the losses are the same. transformers cannot resume such a run, so
its checkpoints hold only the adapter.
"""

from __future__ import annotations

import argparse
import os
from importlib.resources import files

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments
from transformers.distributed import DistributedConfig

import lorank

TINY = str(files("lorank") / "assets" / "tiny_llama")
TEXT = "It was the best of times, it was the worst of times, it was the age of wisdom. " * 40


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=8, help="examples per step, over all processes")
    parser.add_argument("--output", default="trainer-fsdp")
    options = parser.parse_args()
    processes = int(os.environ.get("WORLD_SIZE", "1"))

    base = AutoModelForCausalLM.from_pretrained(TINY, distributed_config=DistributedConfig(fsdp_size=processes))
    torch.manual_seed(0)  # the same new adapter in every process
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM"))

    tokens = AutoTokenizer.from_pretrained(TINY)(TEXT, return_tensors="pt").input_ids[0]
    blocks = tokens[: len(tokens) // 16 * 16].view(-1, 16)  # (blocks, 16)
    train, held_out = blocks[:-8], blocks[-8:]
    allocator = lorank.ALoRA(k1=options.steps // 4, k2=options.steps // 4, rounds=2, unit="steps")
    callback = lorank.RankCallback(allocator, validation_batch={"input_ids": held_out, "labels": held_out})
    trainer = Trainer(
        model,
        TrainingArguments(
            options.output,
            max_steps=options.steps,
            per_device_train_batch_size=options.batch // processes,
            learning_rate=3e-3,
            logging_steps=1,
            save_only_model=True,
            save_steps=options.steps,
            report_to="none",
            use_cpu=not torch.cuda.is_available(),
        ),
        train_dataset=Dataset.from_dict({"input_ids": train.tolist(), "labels": train.tolist()}),
        callbacks=[callback],
    )
    trainer.train()


if __name__ == "__main__":
    main()
