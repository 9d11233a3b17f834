"""Splitting examples: seeded draws and seeded held-out parts, the same on every machine.

Why not `Dataset.shuffle` and `train_test_split` of datasets: they draw another order, so the numbers in docs/ would no
longer match their recipes; they do not keep the references of a prompt together; and a run on files would need the
package.
"""

import math
import random
from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar

from lorank.tasks.errors import DataError
from lorank.tasks.settings import DataSettings

T = TypeVar("T")


def draw(items: Sequence[T], limit: int | None, seed: int) -> list[T]:
    """Draws at most `limit` items in a seeded random order.

    Items are shuffled even without a limit: files are often sorted by label, and ranks are scored on the first 32
    examples of the validation part.
    """
    order = list(range(len(items)))
    random.Random(seed).shuffle(order)
    return [items[i] for i in order[:limit]]


def hold_out(
    items: Sequence[T], fraction: float, seed: int, *, key: Callable[[T], Hashable] | None = None
) -> tuple[list[T], list[T]]:
    """Splits items into (kept, held out), both in their given order. Items with the same key stay together.

    Args:
        items: the items to split.
        fraction: fraction of the keys to hold out, between 0 and 1; at least one key is held out and one is kept.
        seed: decides which keys are held out.
        key: the key of an item; by default every item has its own key.

    Raises:
        DataError: there are fewer than two keys.
    """
    keys = [key(item) for item in items] if key else list(range(len(items)))
    distinct = list(dict.fromkeys(keys))
    if len(distinct) < 2:
        raise DataError(
            f"holdout: {fraction} of {len(distinct)} distinct example(s) cannot be held out. "
            "Give more data, or a separate validation split."
        )
    count = min(max(1, math.ceil(fraction * len(distinct))), len(distinct) - 1)
    held = set(draw(distinct, count, seed))
    kept = [item for item, name in zip(items, keys, strict=True) if name not in held]
    return kept, [item for item, name in zip(items, keys, strict=True) if name in held]


def read_parts(
    settings: DataSettings, read: Callable[[str], Sequence[T]], *, key: Callable[[T], Hashable] | None = None
) -> tuple[Sequence[T], Sequence[T]]:
    """(training part, validation part): two splits, or one split with a held-out part.

    Args:
        settings: name the splits and the fraction to hold out.
        read: returns everything in the split of this name.
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
        raise DataError(f"Data set {settings.data!r}: no test split is configured. Set test_split to its name.")
    return read(settings.test_split)
