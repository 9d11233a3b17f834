"""What lorank knows about a few data sets by name: where the hub keeps them and what a task should read from them.

Nothing here is needed to use another data set; a name that is known only needs fewer lines of configuration. What is
written here takes the place of a settings class's own defaults, and is in its turn replaced by what the user writes.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class KnownData:
    """One data set: its address on the Hugging Face hub and the settings that suit it.

    Args:
        hub: name on the hub, `owner/name`.
        subset: the hub's configuration name, where a data set has several.
        drop: (column, value): rows with this value are left out, so that hub and folder hold the same task.
        defaults: task settings (names as in `lorank.tasks.settings`) that replace the general defaults.
    """

    hub: str
    subset: str | None = None
    drop: tuple[str, str] | None = None
    defaults: Mapping[str, Any] = field(default_factory=dict)


KNOWN: Mapping[str, KnownData] = {
    "rotten_tomatoes": KnownData(hub="cornell-movie-review-data/rotten_tomatoes"),
    # 150 intents; the hub's copy mixes the out-of-scope queries in as a 151st class
    "clinc150": KnownData(
        hub="clinc/clinc_oos", subset="plus", drop=("intent_name", "oos"), defaults={"label": "intent"}
    ),
    # Trained on four fifths of the challenge's validation split and selected on the rest, no meaning representation
    # in both: its training split is not always to be had, and results must be comparable wherever the rows come from.
    "e2e_nlg": KnownData(
        hub="tuetschek/e2e_nlg",
        defaults={
            "train_split": "validation",
            "validation_split": None,
            "holdout": 0.2,
            "prompt": "{meaning_representation}\n",
            "target": "{human_reference}",
        },
    ),
}
