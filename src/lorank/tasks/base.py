"""A task: examples to train on, examples to judge by, and the figures that say how well a model does."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from lorank.tasks.collate import IGNORED, Collator, Example

ModelKind = Literal["causal_lm", "sequence_classification"]
Split = Literal["validation", "test"]
T = TypeVar("T")


class Task(ABC):
    """A data set made ready for one tokenizer, with its metrics.

    Attributes:
        model_kind: the class of model that the task needs.
        label_names: names of the classes in the order of their numbers; empty for causal language models.
        train: encoded training examples.
        validation: encoded examples for evaluation while training, for scoring ranks and for choosing a checkpoint;
            in a seeded random order, so that the first few are a fair sample.
        collator: makes a batch of tensors of a list of examples, padding as needed.
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
        """Encoded test examples, read on first use: nothing but the final report should evaluate them.

        Raises:
            DataError: there is no test split, or it cannot be read.
        """

    @abstractmethod
    def evaluate(
        self, model: nn.Module, split: Split = "test", *, batch_size: int = 32, progress: bool = True
    ) -> dict[str, float]:
        """The task's figures for a model on one split; always `loss`, the mean negative log-likelihood in nats.

        The model's training mode is put back and no gradient is computed.

        Args:
            model: a model of the kind `model_kind`, on any device.
            split: "validation" or "test".
            batch_size: examples per forward pass, or prompts per batch of generated texts.
            progress: show a bar when there is more than one batch.
        """


@contextmanager
def judging(model: nn.Module) -> Iterator[torch.device]:
    """Evaluation mode without gradients; yields the model's device and puts its training mode back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield next(model.parameters()).device
    finally:
        for module, training in modes:
            module.training = training


def batches(items: list[T], size: int, what: str, progress: bool) -> Iterable[list[T]]:
    """Slices of at most `size` items, with a bar that disappears when done."""
    # not torch's DataLoader: each pass over one draws from the global random state, from which training goes on
    parts = [items[start : start + size] for start in range(0, len(items), size)]
    bar: Iterable[list[T]] = tqdm(parts, desc=what, leave=False, disable=not progress or len(parts) < 2)
    return bar


def mean_loss(
    model: nn.Module, examples: Sequence[Example], collator: Collator, *, batch_size: int, progress: bool
) -> float:
    """Mean loss over all predicted labels of all examples, each with equal weight whatever its batch.

    Batches hold examples of similar length, which wastes least on padding and changes nothing in the mean.
    """
    ordered = sorted(examples, key=lambda example: len(example["input_ids"]))
    total, count = 0.0, 0
    with judging(model) as device:
        for part in batches(ordered, batch_size, "Evaluating", progress):
            batch = {name: value.to(device) for name, value in collator(part).items()}
            predicted = predicted_labels(batch["labels"])
            total += float(model(**batch).loss.double()) * predicted
            count += predicted
    return total / count


def predicted_labels(labels: Tensor) -> int:
    """How many labels a loss averages over: (batch,) all of them, (batch, length) those not ignored after the shift."""
    return labels.numel() if labels.dim() == 1 else int((labels[:, 1:] != IGNORED).sum())
