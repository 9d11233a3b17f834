"""Rank allocation in several processes with torchrun, on CPUs or GPUs.

torchrun --nproc-per-node 2 examples/torchrun_loop.py            # DistributedDataParallel
torchrun --nproc-per-node 2 examples/torchrun_loop.py --fsdp     # FSDP2: the base model sharded

On several machines, run the same command on each machine:
torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint FIRST_HOST:29500 examples/torchrun_loop.py
"""

from __future__ import annotations

import argparse
import os
from importlib.resources import files

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM, AutoTokenizer

import lorank

TINY = str(files("lorank") / "assets" / "tiny_llama")
TEXT = "It was the best of times, it was the worst of times, it was the age of wisdom. " * 40


def train(options: argparse.Namespace, device: torch.device) -> None:
    torch.manual_seed(0)  # the same new adapter in every process
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    base = AutoModelForCausalLM.from_pretrained(TINY).to(device)
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
    outer = lorank.shard_base_(model) if options.fsdp else DistributedDataParallel(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)

    tokens = tokenizer(TEXT, return_tensors="pt").input_ids[0].to(device)
    blocks = tokens[: len(tokens) // 16 * 16].view(-1, 16)  # (blocks, 16)
    rows, held_out = blocks[:-8], blocks[-8:]  # the validation batch is the same in every process
    ranks = lorank.attach(
        outer,
        optimizer,
        lorank.ALoRA(k1=options.steps // 4, k2=options.steps // 4, rounds=2, unit="steps"),
        validation_batch={"input_ids": held_out, "labels": held_out},
        total_steps=options.steps,
    )
    draws = torch.Generator().manual_seed(dist.get_rank())  # different rows in each process
    for step in range(options.steps):
        batch = rows[torch.randint(len(rows), (4,), generator=draws).to(device)]
        loss = outer(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if dist.get_rank() == 0 and step % 5 == 4:
            print(f"step {step + 1}: loss {loss.item():.3f}, ranks {sorted(set(ranks.layers.ranks.values()))}")
    ranks.save_adapter(options.output)  # call it in all processes; process 0 writes a plain PEFT adapter


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fsdp", action="store_true", help="shard the base model (FSDP2) instead of copying it (DDP)")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--output", default="torchrun-adapter")
    options = parser.parse_args()

    cuda = torch.cuda.is_available()
    dist.init_process_group("nccl" if cuda else "gloo")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    train(options, device)  # a function of its own, so that nothing uses the process group when it is destroyed
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
