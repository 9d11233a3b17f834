"""Rank allocation in your own training loop: the packaged tiny Llama and Python's reference manual, no download.

python examples/raw_loop.py
"""

from __future__ import annotations

from importlib.resources import files
from pydoc_data.topics import topics

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import lorank

TINY = str(files("lorank") / "assets" / "tiny_llama")


def main(steps: int = 60, rows: int = 8, length: int = 64, output: str = "raw-loop-adapter") -> lorank.Ranks:
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    base = AutoModelForCausalLM.from_pretrained(TINY)
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)

    text = "\n".join(list(topics.values())[:20])
    tokens = tokenizer(text, return_tensors="pt", verbose=False).input_ids[0]
    blocks = tokens[: len(tokens) // length * length].view(-1, length)  # (blocks, length)

    def draw() -> dict[str, torch.Tensor]:
        batch = blocks[torch.randint(len(blocks), (rows,))]
        return {"input_ids": batch, "labels": batch}

    # The only statement for lorank. The rest is an ordinary training loop.
    ranks = lorank.attach(
        model, optimizer, lorank.BalancedLoRA(), train_batches=[draw() for _ in range(4)], total_steps=steps
    )
    for step in range(steps):
        loss = model(**draw()).loss
        loss.backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        if step % 10 == 9:
            print(f"step {step + 1}: loss {loss.item():.3f}, {ranks.layers.total_rank} ranks")

    ranks.save_adapter(output)  # a plain PEFT adapter, with a model card; model.save_pretrained works too
    return ranks


if __name__ == "__main__":
    main()
