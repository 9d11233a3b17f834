"""Rank allocation for a vision transformer; needs `pip install scikit-learn`, whose digits are part of the package.

python examples/vit.py

A tiny ViT learns upright digits with all of its weights. Then it is frozen, and an adapter learns the digits turned by
90 degrees: another input, which asks the modules for changes of different sizes.
"""

from __future__ import annotations

import torch
from peft import LoraConfig, get_peft_model
from sklearn.datasets import load_digits
from torch import Tensor, nn
from transformers import ViTConfig, ViTForImageClassification

import lorank


def small_vit() -> ViTForImageClassification:
    return ViTForImageClassification(
        ViTConfig(
            image_size=8,
            patch_size=2,
            num_channels=1,
            hidden_size=64,
            num_hidden_layers=4,
            num_attention_heads=4,
            intermediate_size=128,
            num_labels=10,
        )
    )


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    model.eval()
    right = model(pixel_values=images).logits.argmax(-1) == labels
    model.train()
    return right.float().mean().item()


def main(base_steps: int = 150, steps: int = 150, rows: int = 64, output: str = "vit-adapter") -> lorank.Ranks:
    torch.manual_seed(0)
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 8 - 1  # (images, 1, 8, 8), from -1 to 1
    labels = torch.tensor(data.target)
    turned = images.rot90(1, (2, 3))
    order = torch.randperm(len(images))
    train, test = order[:-400], order[-400:]

    def draw(of: Tensor) -> dict[str, Tensor]:
        chosen = train[torch.randint(len(train), (rows,))]
        return {"pixel_values": of[chosen], "labels": labels[chosen]}

    base = small_vit().train()
    optimizer = torch.optim.AdamW(base.parameters(), lr=2e-3)
    for _ in range(base_steps):
        base(**draw(images)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    print(f"upright digits: {accuracy(base, images[test], labels[test]):.2f}")
    print(f"turned digits, before: {accuracy(base, turned[test], labels[test]):.2f}")

    model = get_peft_model(
        base, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", exclude_modules="classifier")
    )
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    ranks = lorank.attach(
        model,
        optimizer,
        lorank.BalancedLoRA(),
        train_batches=[draw(turned) for _ in range(4)],
        total_steps=steps,
    )
    for _ in range(steps):
        model(**draw(turned)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    print(f"turned digits, after: {accuracy(model, turned[test], labels[test]):.2f}")
    print({name.removeprefix("vit.layers."): rank for name, rank in ranks.layers.ranks.items()})
    ranks.save_adapter(output, about={"Data": "scikit-learn's digits, turned by 90 degrees"})
    return ranks


if __name__ == "__main__":
    main()
