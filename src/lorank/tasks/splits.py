"""Which examples are used for what: seeded draws and seeded held-out parts, the same on every machine.

Not `Dataset.shuffle` and `train_test_split` of datasets: they draw another order, so that the figures in docs/
would no longer belong to their recipes; they do not keep the references of a prompt on one side; and a run on files
would need the package.
"""

import math
import random
from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar

from lorank.tasks.errors import DataError
from lorank.tasks.settings import DataSettings

T = TypeVar("T")


def draw(items: Sequence[T], limit: int | None, seed: int) -> list[T]:
    """At most `limit` items in a seeded random order.

    Shuffled even without a limit: files are often sorted by label, and the first 32 examples of the validation part
    are what ranks are scored on.
    """
    order = list(range(len(items)))
    random.Random(seed).shuffle(order)
    return [items[i] for i in order[:limit]]


def hold_out(
    items: Sequence[T], fraction: float, seed: int, *, key: Callable[[T], Hashable] | None = None
) -> tuple[list[T], list[T]]:
    """Split into (kept, held out), both in their given order; items with the same key stay together.

    Args:
        items: what to split.
        fraction: part of the keys to hold out, between 0 and 1; at least one key, and at least one is kept.
        seed: decides which.
        key: by default every item is its own.

    Raises:
        DataError: there are fewer than two keys.
    """
    keys = [key(item) for item in items] if key else list(range(len(items)))
    distinct = list(dict.fromkeys(keys))
    if len(distinct) < 2:
        raise DataError(
            f"holdout: {fraction} of {len(distinct)} distinct example(s) cannot be held out. "
            "Give more data, or a validation split of its own."
        )
    count = min(max(1, math.ceil(fraction * len(distinct))), len(distinct) - 1)
    held = set(draw(distinct, count, seed))
    kept = [item for item, name in zip(items, keys, strict=True) if name not in held]
    return kept, [item for item, name in zip(items, keys, strict=True) if name in held]


def read_parts(
    settings: DataSettings, read: Callable[[str], Sequence[T]], *, key: Callable[[T], Hashable] | None = None
) -> tuple[Sequence[T], Sequence[T]]:
    """(for training, for validation): two splits, or one of which a part is held out.

    Args:
        settings: which splits, and how much to hold out.
        read: everything in the split of that name.
        key: see `hold_out`.
    """
    everything = read(settings.train_split)
    if settings.validation_split is not None:
        return everything, read(settings.validation_split)
    assert settings.holdout is not None  # settings allow exactly one of the two
    return hold_out(everything, settings.holdout, settings.seed, key=key)


def read_test(settings: DataSettings, read: Callable[[str], Sequence[T]]) -> Sequence[T]:
    """Everything in the test split.

    Raises:
        DataError: the settings name no test split.
    """
    if settings.test_split is None:
        raise DataError(f"Data set {settings.data!r} was given without a test split: set test_split to its name.")
    return read(settings.test_split)
