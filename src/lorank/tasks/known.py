"""Data sets that lorank knows by name: their source, and default settings for a task.

A known name shortens the configuration; any other data set works too. The defaults here replace the defaults of a
settings class. The user's own settings replace both.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

from lorank.tasks import facts


@dataclass(frozen=True)
class KnownData:
    """One known data set: its task, its address on the Hugging Face hub and its default settings.

    Args:
        task: the task that fits the data.
        hub: name on the hub, `owner/name`; None: lorank itself reads or makes the rows (`lorank.tasks.sources`).
        subset: the configuration name on the hub, if the data set has several.
        drop: (column, value): rows with this value are dropped, so that hub and folder give the same task.
        defaults: task settings (names as in `lorank.tasks.settings`) that replace the general defaults.
    """

    task: Literal["classification", "generation", "language_modelling", "image_classification"]
    hub: str | None = None
    subset: str | None = None
    drop: tuple[str, str] | None = None
    defaults: Mapping[str, Any] = field(default_factory=dict)


KNOWN: Mapping[str, KnownData] = {
    "rotten_tomatoes": KnownData("classification", hub="cornell-movie-review-data/rotten_tomatoes"),
    # 150 intents; the hub's copy also has the out-of-scope queries, as a 151st class
    "clinc150": KnownData(
        "classification",
        hub="clinc/clinc_oos",
        subset="plus",
        drop=("intent_name", "oos"),
        defaults={"label": "intent"},
    ),
    # 77 intents of a bank's customers; there is no validation split
    "banking77": KnownData(
        "classification", hub="PolyAI/banking77", defaults={"validation_split": None, "holdout": 0.1}
    ),
    # Grade-school mathematics; there is no validation split. The loss is on the whole solution.
    "gsm8k": KnownData(
        "generation",
        hub="openai/gsm8k",
        subset="main",
        defaults={
            "validation_split": None,
            "holdout": 0.1,
            "prompt": "Question: {question}\nAnswer: ",
            "target": "{answer}",
        },
    ),
    # Training uses four fifths of the challenge's validation split, selection the other fifth; no meaning
    # representation is in both. The challenge's training split is not always available, and results must be comparable
    # for every source of the rows.
    "e2e_nlg": KnownData(
        "generation",
        hub="tuetschek/e2e_nlg",
        defaults={
            "train_split": "validation",
            "validation_split": None,
            "holdout": 0.2,
            "prompt": "{meaning_representation}\n",
            "target": "{human_reference}",
        },
    ),
    "python_reference": KnownData("language_modelling"),
    "classics": KnownData("language_modelling"),
    "digits": KnownData("image_classification"),
    # invented facts; the value is one word, so that ROUGE-L is the percentage of facts that are answered rightly
    "facts": KnownData(
        "generation",
        defaults={
            "subset": str(facts.DEFAULT),
            "prompt": "{prompt}",
            "target": " {value}",
            "max_length": 64,
            "max_new_tokens": 4,
        },
    ),
}


def nearest_name(data: str) -> str | None:
    """The known name that ``data`` is nearly, as of a spelling mistake.

    Returns:
        The name; None: there is none, or ``data`` is known, a path, a folder in LORANK_DATA, or has an owner.
    """
    if data in KNOWN or "/" in data or "\0" in data or len(data) > 200:
        return None
    if Path(data).expanduser().exists() or (Path(os.environ.get("LORANK_DATA") or os.devnull) / data).is_dir():
        return None
    return next(iter(get_close_matches(data.lower(), KNOWN, n=1, cutoff=0.7)), None)
