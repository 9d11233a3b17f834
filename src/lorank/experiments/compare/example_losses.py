"""The loss of every test example, which the bootstrap resamples."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from lorank.tasks import Task
from lorank.tasks.base import evaluating
from lorank.tasks.collate import IGNORED, Example, length


def example_losses(
    model: nn.Module, examples: Sequence[Example], task: Task, *, batch_size: int
) -> dict[str, NDArray[Any]]:
    """What the bootstrap resamples: for every example, in the given order,

    losses: (examples,) the sum over its labels of −log p, in nats;
    labels: (examples,) the number of its labels;
    correct: (examples,) 1 if its class is found (classification only);
    groups: (examples,) a number that examples with the same prompt share, since they are not independent.
    """
    order = sorted(range(len(examples)), key=lambda index: length(examples[index]))
    losses, labels = np.zeros(len(examples)), np.zeros(len(examples))
    correct = None if task.model_kind == "causal_lm" else np.zeros(len(examples))
    with evaluating(model) as device:
        for start in range(0, len(order), batch_size):
            part = order[start : start + batch_size]
            batch = {k: v.to(device) for k, v in task.collator([examples[index] for index in part]).items()}
            logits, wanted = model(**batch).logits.float(), batch["labels"]
            if correct is None:
                logits, wanted = logits[:, :-1], wanted[:, 1:]  # (batch, length − 1, vocabulary), (batch, length − 1)
            each = nn.functional.cross_entropy(
                logits.reshape(-1, logits.shape[-1]), wanted.reshape(-1), ignore_index=IGNORED, reduction="none"
            ).view(len(part), -1)  # (batch · length,) → (batch, length), or (batch, 1) for classes
            losses[part] = each.double().sum(1).cpu().numpy()
            labels[part] = (wanted.view(len(part), -1) != IGNORED).sum(1).cpu().numpy()
            if correct is not None:
                correct[part] = (logits.argmax(-1) == wanted).cpu().numpy()
    found = {"losses": losses, "labels": labels, "groups": _groups(examples)}
    return found if correct is None else {**found, "correct": correct}


def _groups(examples: Sequence[Example]) -> NDArray[Any]:
    """Numbers that examples with the same prompt share; every example without a prompt has its own."""
    numbers: dict[tuple[int, ...], int] = {}
    groups = []
    for place, example in enumerate(examples):
        labels = example["labels"]
        ignored = [] if isinstance(labels, int) else [label == IGNORED for label in labels]
        prompt = itertools.compress(example.get("input_ids", ()), ignored)
        groups.append(numbers.setdefault(tuple(prompt) or (-1, place), len(numbers)))
    return np.array(groups)
