"""Image classification: accuracy on scikit-learn's digits."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from lorank.tasks.base import ModelKind
from lorank.tasks.classification import ClassTask, number_labels
from lorank.tasks.collate import Example, ImageCollator
from lorank.tasks.digits import INK
from lorank.tasks.settings import ImageClassificationSettings
from lorank.tasks.sources import Row, load_rows
from lorank.tasks.splits import draw, read_parts, read_test


class ImageClassificationTask(ClassTask):
    """Image classification. Examples hold `pixel_values`, (1, 8, 8) from −1 (paper) to 1 (ink), and `labels`, a number.

    Raises:
        MissingPackageError: the package with the data is not installed.
        DataError: a split does not exist.
    """

    model_kind: ModelKind = "image_classification"

    def __init__(self, settings: ImageClassificationSettings) -> None:
        self._settings = settings
        self.collator = ImageCollator(settings.image_size, settings.channels)
        self.has_test = settings.test_split is not None
        kept, held = read_parts(settings, self._load)
        rows = kept if settings.holdout is None else [*kept, *held]
        self._numbers = number_labels(rows, "label", f"Data set {settings.data!r}, split {settings.train_split!r}")
        self.label_names = tuple(str(label) for label in self._numbers)
        self.train = self._encode(draw(kept, settings.max_train, settings.seed))
        self.validation = self._encode(draw(held, settings.max_eval, settings.seed))

    @cached_property
    def test(self) -> list[Example]:
        """Encoded test examples (see `Task.test`)."""
        settings = self._settings
        return self._encode(draw(read_test(settings, self._load), settings.max_eval, settings.seed))

    def _load(self, split: str) -> list[Row]:
        return load_rows(self._settings.data, split)

    def _encode(self, rows: Sequence[Row]) -> list[Example]:
        images = torch.tensor([row["image"] for row in rows]) * (2 / INK) - 1  # (images, 8, 8)
        images = scramble(images, self._settings.scramble)[:, None]  # (images, 1, 8, 8)
        return [
            {"pixel_values": image, "labels": self._numbers[row["label"]]}
            for image, row in zip(images, rows, strict=True)
        ]


def scramble(images: Tensor, share: float) -> Tensor:
    """Exchanges the places of a share of the pixels, by one permutation for all images.

    Args:
        images: (images, height, width).
        share: of the pixels that are drawn to be exchanged, 0 to 1. The draws are nested: what a smaller share moves, a
            larger one moves too.
    """
    flat = images.flatten(1)  # (images, height · width)
    count = flat.shape[1]
    drawn = torch.randperm(count, generator=torch.Generator().manual_seed(0))[: round(share * count)]
    places = torch.arange(count)
    places[drawn] = drawn.roll(1)  # one cycle: every drawn pixel moves
    return flat[:, places].view_as(images)
