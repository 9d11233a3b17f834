"""Metrics of classes, against one example at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn


def check_metrics(task: Any, model: nn.Module) -> None:
    """Accuracy and loss agree with one example at a time, and the model stays in training mode."""
    model.train()
    figures = task.evaluate(model, "validation", batch_size=3, progress=False)
    assert model.training
    model.eval()
    losses, right = [], []
    for example in task.validation:
        with torch.no_grad():
            output = model(**task.collator([example]))
        losses.append(output.loss.item())
        right.append(output.logits.argmax().item() == example["labels"])
    assert figures == {
        "loss": pytest.approx(sum(losses) / len(losses), abs=1e-6),
        "accuracy": sum(right) / len(right),
    }
