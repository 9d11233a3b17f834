"""Invented facts, made by a fixed rule: how many of them does an adapter store?

A fact is a key of two words and a value of one: "the old horse" → "night". Values are drawn independently and
uniformly, so that nothing can be known but by storing it. The number of facts turns the capacity that this needs. The
facts of a smaller number are among those of a larger one.

Every fact is in every split, in other words: training has four phrasings of it, validation and test one each that
training lacks. So the loss measures what is stored, not the phrasing that it was learned in.

All words are common, and values are words that the packaged tiny Llama can predict with certainty: variants with rare
words as keys or values were tried, and an adapter that leaves embeddings alone learned little of them in 200 steps.
"""

import random

from lorank.tasks.errors import DataError

DEFAULT = 128
"""Number of facts if the settings name none."""

SEED = 0
"""Decides the order of the keys and their values; not a setting, so that `facts` with a number is one data set."""


def _words(*lines: str) -> tuple[str, ...]:
    return tuple(" ".join(lines).split())


ADJECTIVES = _words(
    "old little great good young poor big white black long red green beautiful happy strange kind dear",
    "wild dark cold bright small new first",
)
NOUNS = _words(
    "man girl boy king horse dog house tree woman child father mother bird cat bear queen prince princess fairy",
    "lion fox pig boat river garden room table book door hill road school church ship box hat ring dress fire star",
)
VALUES = _words("time world morning night hand eyes door sun bed room school star girl mother cow money")

# each ends where the value begins
PHRASINGS = {
    "train": (
        "Here is the {adjective} {noun}",
        "I remember the {adjective} {noun}",
        "Once upon a time, the {adjective} {noun}",
        "As for the {adjective} {noun}",
    ),
    "validation": ("You must know the {adjective} {noun}",),
    "test": ("They told me of the {adjective} {noun}",),
}

MOST = len(ADJECTIVES) * len(NOUNS)
"""The largest number of facts."""


def read_facts(split: str, number: str | None = None) -> list[dict[str, str]]:
    """The facts of one split, one row per phrasing; columns prompt and value.

    Args:
        split: train, validation or test.
        number: number of facts, 1 to `MOST`, as a string of digits; None: `DEFAULT`.

    Raises:
        DataError: there is no such split or number of facts.
    """
    if split not in PHRASINGS:
        raise DataError(f"Data set 'facts' has the splits train, validation and test, not {split!r}.")
    wanted = str(DEFAULT) if number is None else number
    if not (wanted.isascii() and wanted.isdigit() and 1 <= int(wanted) <= MOST):
        raise DataError(f"Data set 'facts': subset is {number!r}, not a number of facts. Give one from 1 to {MOST}.")
    return [
        {"prompt": phrasing.format(adjective=adjective, noun=noun), "value": value}
        for adjective, noun, value in _facts()[: int(wanted)]
        for phrasing in PHRASINGS[split]
    ]


def _facts() -> list[tuple[str, str, str]]:
    """All facts as (adjective, noun, value)."""
    draw = random.Random(SEED)
    keys = [(adjective, noun) for adjective in ADJECTIVES for noun in NOUNS]
    draw.shuffle(keys)
    return [(adjective, noun, draw.choice(VALUES)) for adjective, noun in keys]
