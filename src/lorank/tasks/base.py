"""A task: examples for training, examples for evaluation, and metrics of a model."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from lorank.tasks.collate import IGNORED, Collator, Example, length

ModelKind = Literal["causal_lm", "sequence_classification", "image_classification"]
Split = Literal["validation", "test"]
T = TypeVar("T")


class Task(ABC):
    """A data set encoded for one tokenizer, or as images, with its metrics.

    Attributes:
        model_kind: the kind of model that the task needs.
        label_names: names of the classes in the order of their numbers; empty for causal language models.
        train: encoded training examples.
        validation: encoded examples for evaluation while training, for scoring ranks and for choosing a checkpoint;
            in a seeded random order, so that the first examples are a fair sample.
        collator: makes a batch of tensors from a list of examples; pads texts.
        has_test: whether there is a test split.
    """

    model_kind: ModelKind
    label_names: tuple[str, ...]
    train: list[Example]
    validation: list[Example]
    collator: Collator
    has_test: bool

    @property
    @abstractmethod
    def test(self) -> list[Example]:
        """Encoded test examples, read on first use. Only the final report should use them.

        Raises:
            DataError: there is no test split, or the test split cannot be read.
        """

    @abstractmethod
    def evaluate(
        self, model: nn.Module, split: Split = "test", *, batch_size: int = 32, progress: bool = True
    ) -> dict[str, float]:
        """The task's metrics for a model on one split.

        Evaluates in evaluation mode without gradients, then restores the model's training mode.

        Args:
            model: a model of the kind `model_kind`, on any device.
            split: "validation" or "test".
            batch_size: examples per forward pass, or prompts per batch of generated texts.
            progress: show a progress bar if there is more than one batch.

        Returns:
            The metrics by name; always `loss`, the mean negative log-likelihood in nats.
        """


@contextmanager
def evaluating(model: nn.Module) -> Iterator[torch.device]:
    """Evaluation mode without gradients. Yields the model's device, and restores its training mode at the end."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield next(model.parameters()).device
    finally:
        for module, training in modes:
            module.training = training


def batches(items: list[T], size: int, what: str, progress: bool) -> Iterable[list[T]]:
    """Batches of at most `size` items, with a progress bar that disappears at the end."""
    # not torch's DataLoader: each pass over it draws from the global random state, which training needs unchanged
    parts = [items[start : start + size] for start in range(0, len(items), size)]
    bar: Iterable[list[T]] = tqdm(parts, desc=what, leave=False, disable=not progress or len(parts) < 2)
    return bar


def mean_loss(
    model: nn.Module, examples: Sequence[Example], collator: Collator, *, batch_size: int, progress: bool
) -> float:
    """Mean loss over all predicted labels of all examples; every label has equal weight.

    Each batch holds examples of similar length, which needs the least padding and does not change the mean.
    """
    ordered = sorted(examples, key=length)
    total, count = 0.0, 0
    with evaluating(model) as device:
        for part in batches(ordered, batch_size, "Evaluating", progress):
            batch = {name: value.to(device) for name, value in collator(part).items()}
            predicted = predicted_labels(batch["labels"])
            total += float(model(**batch).loss.double()) * predicted
            count += predicted
    return total / count


def predicted_labels(labels: Tensor) -> int:
    """The number of labels in a mean loss. Labels (batch,): all; (batch, length): the labels not ignored, shifted."""
    return labels.numel() if labels.dim() == 1 else int((labels[:, 1:] != IGNORED).sum())
