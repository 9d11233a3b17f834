"""Text classification: accuracy on rotten_tomatoes, clinc150 or any data set with text and a label."""

from collections.abc import Sequence
from functools import cached_property

from torch import nn
from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase

from lorank.tasks.base import ModelKind, Split, Task, batches, evaluating
from lorank.tasks.collate import Collator, Example, length, padding_tokenizer
from lorank.tasks.errors import DataError
from lorank.tasks.settings import ClassificationSettings
from lorank.tasks.sources import Row, load_rows
from lorank.tasks.splits import draw, read_parts, read_test
from lorank.tasks.template import render, require_columns

Label = int | str


class ClassTask(Task):
    """A task whose examples have one class each: of texts or of images."""

    collator: Collator

    def evaluate(
        self, model: nn.Module, split: Split = "test", *, batch_size: int = 32, progress: bool = True
    ) -> dict[str, float]:
        """`loss` (nats per example) and `accuracy` (0 to 1); see `Task.evaluate`."""
        examples = self.test if split == "test" else self.validation
        return class_metrics(model, examples, self.collator, batch_size=batch_size, progress=progress)


class ClassificationTask(ClassTask):
    """Text classification. Labels are numbered in the sorted order of all labels in the whole training split, even if
    only a part of the split is drawn.

    Raises:
        DataError: a split or column does not exist; a label is neither a whole number nor a string, or does not occur
            in the training split; all rows have the same label.
    """

    model_kind: ModelKind = "sequence_classification"

    def __init__(self, settings: ClassificationSettings, tokenizer: PreTrainedTokenizerBase) -> None:
        self._settings = settings
        self._tokenizer = tokenizer
        self.collator = DataCollatorWithPadding(padding_tokenizer(tokenizer))
        self.has_test = settings.test_split is not None
        kept, held = read_parts(settings, self._load)
        # with the held-out part: a label may occur in that part only
        rows = kept if settings.holdout is None else [*kept, *held]
        self._numbers = number_labels(rows, settings.label, self._where(settings.train_split))
        self.label_names = _label_names(rows, settings.label, self._numbers)
        self.train = self._encode(draw(kept, settings.max_train, settings.seed), settings.train_split)
        self.validation = self._encode(
            draw(held, settings.max_eval, settings.seed), settings.validation_split or settings.train_split
        )

    @cached_property
    def test(self) -> list[Example]:
        """Encoded test examples (see `Task.test`)."""
        settings = self._settings
        rows = draw(read_test(settings, self._load), settings.max_eval, settings.seed)
        return self._encode(rows, settings.test_split or "")

    def _load(self, split: str) -> list[Row]:
        return load_rows(self._settings.data, split, subset=self._settings.subset)

    def _where(self, split: str) -> str:
        return f"Data set {self._settings.data!r}, split {split!r}"

    def _encode(self, rows: Sequence[Row], split: str) -> list[Example]:
        settings, where = self._settings, self._where(split)
        firsts = [render(settings.template, row, where) for row in rows]
        seconds = [render(settings.second, row, where) for row in rows] if settings.second else None
        encoded = self._tokenizer(firsts, seconds, truncation=True, max_length=settings.max_length)
        examples: list[Example] = []
        for index, row in enumerate(rows):
            require_columns(row, (settings.label,), where)
            if row[settings.label] not in self._numbers:
                raise DataError(
                    f"{where}: the label {row[settings.label]!r} does not occur in {settings.train_split!r}, which has "
                    f"{len(self._numbers)} labels. A test split without labels often has -1: name a labelled split."
                )
            inputs = {name: values[index] for name, values in encoded.items()}
            examples.append({**inputs, "labels": self._numbers[row[settings.label]]})
        return examples


def class_metrics(
    model: nn.Module, examples: Sequence[Example], collator: Collator, *, batch_size: int, progress: bool
) -> dict[str, float]:
    """`loss`, the mean negative log-likelihood of the right class in nats, and `accuracy`, 0 to 1."""
    # batches of examples of similar length need the least padding
    ordered = sorted(examples, key=length)
    loss, correct = 0.0, 0
    with evaluating(model) as device:
        for part in batches(ordered, batch_size, "Classifying", progress):
            batch = {name: value.to(device) for name, value in collator(part).items()}
            output = model(**batch)
            loss += float(output.loss.double()) * len(part)
            correct += int((output.logits.argmax(-1) == batch["labels"]).sum())  # (batch, labels) → (batch,)
    return {"loss": loss / len(ordered), "accuracy": correct / len(ordered)}


def number_labels(rows: Sequence[Row], column: str, where: str) -> dict[Label, int]:
    """Numbers every label that occurs, from 0: whole numbers in ascending order, then strings in sorted order.

    Raises:
        DataError: the column does not exist, holds values of another type, or holds one value only.
    """
    labels: set[Label] = set()
    for index, row in enumerate(rows):
        require_columns(row, (column,), f"{where}, row {index}")
        if isinstance(row[column], bool) or not isinstance(row[column], int | str):
            raise DataError(
                f"{where}, row {index}: the label {row[column]!r} in column {column!r} is neither a whole number nor a "
                "string. Name the right column as label."
            )
        labels.add(row[column])
    if len(labels) < 2:
        raise DataError(
            f"{where}: every row has the label {labels.pop()!r}; expected at least two labels. "
            "Name the right column as label, or give more data."
        )
    return {label: number for number, label in enumerate(sorted(labels, key=lambda v: (isinstance(v, str), v)))}


def _label_names(rows: Sequence[Row], column: str, numbers: dict[Label, int]) -> tuple[str, ...]:
    """Names of the labels: from a column `<label>_name` if there is one, else the labels themselves."""
    names = {number: str(label) for label, number in numbers.items()}
    for row in rows:
        if row.get(f"{column}_name") is not None:
            names[numbers[row[column]]] = str(row[f"{column}_name"])
    return tuple(names[number] for number in range(len(names)))
