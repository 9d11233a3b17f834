"""Running statistics that move are warned of once, with remedies that work."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.nn import functional as F
from transformers.modeling_outputs import ImageClassifierOutput

import lorank
from tests.convolutions import picture_batch
from tests.messages import warnings_of_lorank


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 10)

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor) -> ImageClassifierOutput:
        logits = self.head(self.norm(self.conv(pixel_values)).mean((2, 3)))
        return ImageClassifierOutput(loss=F.cross_entropy(logits, labels), logits=logits)


def base() -> Any:
    torch.manual_seed(0)
    return Net()


def in_evaluation_mode(model: PeftModel) -> None:
    model.train()
    model.base_model.model.norm.eval()


def without_momentum(model: PeftModel) -> None:
    model.train()
    model.base_model.model.norm.momentum = 0.0


REMEDIES: dict[str, tuple[Callable[[PeftModel], Any], dict[str, Any]]] = {
    "eval": (in_evaluation_mode, {}),
    "momentum": (without_momentum, {}),
    "saved": (PeftModel.train, {"modules_to_save": ["norm"]}),
}


@pytest.mark.parametrize("remedy", [None, *REMEDIES])
def test_it_is_warned_of_and_the_remedies_work(remedy: str | None, tmp_path: Path) -> None:
    prepare, lora = REMEDIES.get(str(remedy), (PeftModel.train, {}))
    model = get_peft_model(base(), LoraConfig(r=2, target_modules=["conv", "head"], **lora))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    ranks = lorank.attach(model, optimizer, lorank.SoRA(budget="3 ranks", until=0.5), total_steps=4)
    prepare(model)
    with warnings_of_lorank() as heard:
        for step in range(4):
            model(**picture_batch(seed=step)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    found = [text for text in heard if "running statistics" in text]
    assert len(found) == (remedy is None)
    assert all("1 modules of the base model (base_model.model.norm)" in text for text in found)
    assert sum(ranks.layers.ranks.values()) <= 3
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        live = model.eval()(**picture_batch(seed=9)).logits
        loaded = PeftModel.from_pretrained(base(), tmp_path).eval()(**picture_batch(seed=9)).logits
    assert torch.allclose(loaded, live, rtol=1e-5, atol=1e-6) == (remedy is not None)
