"""Tiny real models for every test: a Llama with grouped-query attention, a BERT classifier, a GPT-2 (Conv1D), a ViT."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from sklearn.datasets import load_digits
from torch import Tensor
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    ViTConfig,
    ViTForImageClassification,
)

VOCABULARY = 64


def tiny_llama(layers: int = 2, **changes: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
    }
    return LlamaForCausalLM(LlamaConfig(**{**settings, **changes}))


def tiny_bert(labels: int = 3) -> PreTrainedModel:
    torch.manual_seed(0)
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=48,
            max_position_embeddings=64,
            num_labels=labels,
        )
    )


def tiny_gpt2() -> PreTrainedModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2
        )
    )


def tiny_vit(labels: int = 10) -> PreTrainedModel:
    """For the 8 × 8 images of scikit-learn's digits, in patches of 2 × 2."""
    torch.manual_seed(0)
    return ViTForImageClassification(
        ViTConfig(
            image_size=8,
            patch_size=2,
            num_channels=1,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=48,
            num_labels=labels,
        )
    )


def adapted(model: PreTrainedModel, *, random_B: bool = True, **lora: Any) -> PeftModel:
    """The model with a LoRA adapter; ``random_B`` gives the update a value, as if it had been trained."""
    peft_model = get_peft_model(model, LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": "all-linear", **lora}))
    if random_B:
        generator = torch.Generator().manual_seed(1)
        for name, parameter in peft_model.named_parameters():
            if "lora_B" in name or "lora_embedding_A" in name:
                parameter.data = torch.randn(parameter.shape, generator=generator).to(parameter) * 0.2
    return peft_model


def token_batch(rows: int = 4, length: int = 10, *, padded: bool = False, seed: int = 0) -> dict[str, Tensor]:
    """Tokens, attention mask and labels; with ``padded``, rows end early (labels −100 there)."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    if padded:
        for row in range(rows):
            mask[row, length - row % 4 :] = 0
    ids = ids.masked_fill(mask == 0, 0)
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def class_batch(rows: int = 4, length: int = 10, classes: int = 3, *, padded: bool = False) -> dict[str, Tensor]:
    batch = token_batch(rows, length, padded=padded)
    return {**batch, "labels": torch.arange(rows) % classes}


def digit_batch(rows: int = 4, *, first: int = 0) -> dict[str, Tensor]:
    """Images of scikit-learn's digits, (rows, 1, 8, 8) in [0, 1], and which digit each shows."""
    digits = load_digits()
    images = torch.tensor(digits.images[first : first + rows], dtype=torch.float32) / 16
    return {"pixel_values": images.unsqueeze(1), "labels": torch.tensor(digits.target[first : first + rows])}
