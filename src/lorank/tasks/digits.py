"""Scikit-learn's handwritten digits, part of its package: 1,797 images of 8 × 8 pixels, with a fixed split."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

from lorank.extras import require
from lorank.tasks.errors import DataError

INK = 16
"""The largest value of a pixel; 0 is paper."""
PARTS = {"train": slice(0, 997), "validation": slice(997, 1397), "test": slice(1397, None)}


def load_digits_split(split: str) -> list[Mapping[str, Any]]:
    """The images of one split: rows with `image`, 8 lists of 8 numbers from 0 to `INK`, and `label`, 0 to 9.

    The images are split in a fixed random order: neighbours in the data set were written by the same person, so parts
    of the stored order would have different writers.

    Args:
        split: train (997 images), validation (400) or test (400).

    Raises:
        MissingPackageError: scikit-learn is not installed.
        DataError: there is no such split.
    """
    if split not in PARTS:
        raise DataError(f"Data set 'digits' has the splits {', '.join(PARTS)}, not {split!r}.")
    require("the data set 'digits'", "sklearn")
    from sklearn.datasets import load_digits  # slow

    data = load_digits()
    order = list(range(len(data.target)))
    random.Random(0).shuffle(order)
    return [{"image": data.images[i].tolist(), "label": int(data.target[i])} for i in order[PARTS[split]]]
