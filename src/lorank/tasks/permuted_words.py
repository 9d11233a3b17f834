"""A permuted vocabulary: the most frequent words of a text are exchanged among each other.

A model that knows the language must learn which word stands for which. The number of words turns the capacity that
this needs. A word is a run of letters, also with an apostrophe inside (don't); capital and small letters make different
words. Everything else in the text stays as it is, so the rule can be undone.
"""

import random
import re
from collections import Counter
from collections.abc import Iterable, Mapping

from lorank.tasks.errors import DataError

_WORD = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)*")


def word_permutation(texts: Iterable[str], count: int, seed: int, where: str) -> dict[str, str]:
    """Which word is written instead of each of the ``count`` most frequent words of ``texts``.

    The permutation is one cycle, drawn with ``seed``: every word is replaced. Words of equal frequency are ordered by
    where they first occur.

    Args:
        texts: the training texts.
        count: number of words, at least 2.
        seed: decides the permutation.
        where: names the texts in the error.

    Raises:
        DataError: the texts have fewer different words.
    """
    found = Counter(word for text in texts for word in _WORD.findall(text))
    if len(found) < count:
        raise DataError(
            f"{where}: permute_words is {count}, but the training text has only {len(found)} different words. "
            "Give a smaller number or more text."
        )
    words = [word for word, _ in found.most_common(count)]
    random.Random(seed).shuffle(words)
    return dict(zip(words, [*words[1:], words[0]], strict=True))


def replace_words(text: str, replacements: Mapping[str, str]) -> str:
    """The text with every word replaced that is a key of ``replacements``."""
    return _WORD.sub(lambda match: replacements.get(match[0], match[0]), text)
