"""Rank allocation with accelerate, in one process or several, with any `accelerate config`.

accelerate launch --cpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no examples/accelerate_loop.py

On several machines, run this on each machine with its own --machine_rank:
accelerate launch --num_machines 2 --num_processes 16 --machine_rank 0 --main_process_ip FIRST_HOST --main_process_port 29500 …
"""  # noqa: E501  # commands to copy

from __future__ import annotations

import argparse
from importlib.resources import files

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

import lorank

TINY = str(files("lorank") / "assets" / "tiny_llama")
TEXT = "It was the best of times, it was the worst of times, it was the age of wisdom. " * 40


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--output", default="accelerate-adapter")
    options = parser.parse_args()

    accelerator = Accelerator()
    set_seed(0)  # the same new adapter in every process
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    base = AutoModelForCausalLM.from_pretrained(TINY)
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    tokens = tokenizer(TEXT, return_tensors="pt").input_ids[0]
    blocks = tokens[: len(tokens) // 16 * 16].view(-1, 16)  # (blocks, 16)
    train, held_out = blocks[:-8], blocks[-8:]
    loader = DataLoader(list(train), batch_size=4, shuffle=True)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

    ranks = lorank.attach(  # after prepare, because prepare moves the model to its device
        model,
        optimizer,
        lorank.ALoRA(k1=options.steps // 4, k2=options.steps // 4, rounds=2, unit="steps"),
        validation_batch={"input_ids": held_out, "labels": held_out},
        total_steps=options.steps,
    )
    while ranks.step < options.steps:
        for batch in loader:
            loss = model(input_ids=batch, labels=batch).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            if ranks.step % 5 == 0:
                accelerator.print(
                    f"step {ranks.step}: loss {loss.item():.3f}, ranks {sorted(set(ranks.layers.ranks.values()))}"
                )
            if ranks.step == options.steps:
                break
    ranks.save_adapter(options.output)  # call it in all processes; process 0 writes a plain PEFT adapter
    accelerator.end_training()


if __name__ == "__main__":
    main()
