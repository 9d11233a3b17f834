"""Rank allocation in your own training loop: the packaged tiny Llama and the text of `import this`, no download.

python examples/any_loop.py
"""

from __future__ import annotations

import codecs
import contextlib
import io
from importlib.resources import files

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import lorank

TINY = str(files("lorank") / "assets" / "tiny_llama")


def zen() -> str:
    with contextlib.redirect_stdout(io.StringIO()):
        import this
    return codecs.decode(this.s, "rot13")


def main(steps: int = 40, output: str = "zen-adapter") -> lorank.Ranks:
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    base = AutoModelForCausalLM.from_pretrained(TINY)
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)

    tokens = tokenizer(zen(), return_tensors="pt").input_ids[0]
    blocks = tokens[: len(tokens) // 32 * 32].view(-1, 32)  # (blocks, 32)
    train, held_out = blocks[:-3], blocks[-3:]

    # The only line for lorank. The rest is an ordinary training loop.
    ranks = lorank.attach(
        model,
        optimizer,
        lorank.ALoRA(k1=steps // 4, k2=steps // 4, rounds=2, unit="steps"),
        validation_batch={"input_ids": held_out, "labels": held_out},
        total_steps=steps,
    )
    for step in range(steps):
        batch = train[torch.randint(len(train), (4,))]
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 9:
            print(f"step {step + 1}: loss {loss.item():.3f}, ranks {sorted(set(ranks.layers.ranks.values()))}")

    model.save_pretrained(output)  # a plain PEFT adapter
    return ranks


if __name__ == "__main__":
    main()
