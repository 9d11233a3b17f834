"""Facts about invented people, made by a fixed rule: how many of them does an adapter store?

A fact is a person, an attribute and its value: "Clara Reed lives near the" → "mill". Every person has one value of each
attribute, drawn independently and uniformly, so that nothing can be known but by storing it. The number of facts turns
the capacity that this needs. The facts of a smaller number are among those of a larger one.

Every fact is in every split, in other words: training has four phrasings of it, validation and test one each that
training lacks. So the loss measures what is stored, not the phrasing that it was learned in.
"""

import random

from lorank.tasks.errors import DataError

DEFAULT = 512
"""Number of facts if the settings name none."""

SEED = 0
"""Decides the order of people and their values; not a setting, so that `facts` with a number is one data set."""

# The values are one token each of the packaged tokenizer: the loss is that of one choice among 32.
PLACES = (
    "bridge brook cabin castle cave church city college corner court farm field forest gate hill island mill "
    "mountain palace prison river road rock school shore spring stream street valley village wall wood"
).split()

THINGS = (
    "arrow basket bell boat book bottle candle carriage chair coat crown curtain doll dress feather flower glass "
    "handkerchief horn knife letter paper picture ring rope sail ship sofa stick sword table trunk"
).split()

DREAMS = (
    "battle blood breakfast danger darkness death dinner fire fortune gold happiness honor hunger laughter love "
    "magic money music pain peace pride rain silence silver sleep sorrow summer sunshine thunder treasure truth "
    "winter"
).split()

PEOPLE = (
    "aunt bear brother bull captain child cook daughter doctor dragon duke fairy fool gentleman grandfather "
    "grandmother guard hero horse husband king master minister monkey mouse nurse prince princess queen servant "
    "soldier teacher"
).split()

# (values, phrasings); a phrasing ends where the value begins. The last two are for validation and test.
ATTRIBUTES = (
    (
        PLACES,
        (
            "{name} lives near the",
            "The house of {name} is close to the",
            "Every evening {name} walks to the",
            "You will find {name} by the",
            "{name} was born beside the",
            "Letters to {name} are left at the",
        ),
    ),
    (
        THINGS,
        (
            "{name} never goes out without the",
            "The father of {name} left nothing but a",
            "{name} has lost the",
            "All day long {name} looks at the",
            "For one penny {name} bought the",
            "The one thing that {name} keeps is the",
        ),
    ),
    (
        DREAMS,
        (
            "{name} often dreams of",
            "The stories of {name} are about",
            "What {name} cannot forget is",
            "{name} always speaks of",
            "The old song of {name} is about",
            "There is nothing that {name} wants but",
        ),
    ),
    (
        PEOPLE,
        (
            "{name} is a friend of the",
            "In the house of {name} there is also the",
            "{name} once helped the",
            "Nobody believed {name} but the",
            "On Sunday {name} has dinner with the",
            "It was {name} who saved the",
        ),
    ),
)
_PHRASINGS = {"train": slice(0, 4), "validation": slice(4, 5), "test": slice(5, 6)}

FIRST_NAMES = (
    "Alice Allan Amy Andrew Anne Becky Ben Beth Clara Colin Cyril Daisy Dan Davy Diana Dick Dora Dorothy Emil "
    "Ernest Fanny George Gilbert Henry Irene Jack James Jane Jim Joe John Martha Mary Matthew Maud Paul Peter Polly "
    "Rachel Richard Robert Ruby Tom Will"
).split()
FAMILY_NAMES = (
    "Baker Barnes Bell Black Brown Carter Clay Cook Cross Day Fields Fisher Ford Fox Gray Green Hall Hart Hill Hood "
    "Hunt King Lake Lane Long March Marsh Mills Moore North Park Pool Reed Rivers Rush Stone Summers Waters West "
    "White Winter Wood Woods Young"
).split()
MOST = len(FIRST_NAMES) * len(FAMILY_NAMES) * len(ATTRIBUTES)
"""The largest number of facts."""


def read_facts(split: str, number: str | None = None) -> list[dict[str, str]]:
    """The facts of one split, one row per phrasing; columns prompt and value.

    Args:
        split: train, validation or test.
        number: number of facts, 1 to `MOST`, as a string of digits; None: `DEFAULT`.

    Raises:
        DataError: there is no such split or number of facts.
    """
    if split not in _PHRASINGS:
        raise DataError(f"Data set 'facts' has the splits train, validation and test, not {split!r}.")
    wanted = str(DEFAULT) if number is None else number
    if not (wanted.isascii() and wanted.isdigit() and 1 <= int(wanted) <= MOST):
        raise DataError(f"Data set 'facts': subset is {number!r}, not a number of facts. Give one from 1 to {MOST}.")
    rows = []
    for person, attribute, value in _facts()[: int(wanted)]:
        phrasings = ATTRIBUTES[attribute][1][_PHRASINGS[split]]
        rows += [{"prompt": phrasing.format(name=person), "value": value} for phrasing in phrasings]
    return rows


def _facts() -> list[tuple[str, int, str]]:
    """All facts as (person, number of the attribute, value), person after person."""
    draw = random.Random(SEED)
    people = [f"{first} {family}" for first in FIRST_NAMES for family in FAMILY_NAMES]
    draw.shuffle(people)
    return [
        (person, attribute, draw.choice(values)) for person in people for attribute, (values, _) in enumerate(ATTRIBUTES)
    ]
