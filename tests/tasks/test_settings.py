"""Task settings: what known data sets fill in, and which combinations are refused."""

from typing import Any

import pytest
from pydantic import ValidationError

from lorank.tasks import ClassificationSettings, GenerationSettings, LanguageModellingSettings
from lorank.tasks.known import KNOWN


def test_known_data_fill_in_what_was_not_written() -> None:
    settings = GenerationSettings(data="e2e_nlg")
    assert (settings.train_split, settings.validation_split, settings.holdout) == ("validation", None, 0.2)
    assert settings.prompt == "{meaning_representation}\n"
    assert ClassificationSettings(data="clinc150").label == "intent"


def test_what_is_written_wins() -> None:
    settings = GenerationSettings(data="e2e_nlg", prompt="Say {x}", train_split="train", validation_split="validation")
    assert (settings.prompt, settings.validation_split, settings.holdout) == ("Say {x}", "validation", None)


def test_settings_survive_writing_out() -> None:
    for settings in (
        GenerationSettings(data="e2e_nlg"),
        ClassificationSettings(data="rotten_tomatoes"),
        ClassificationSettings(data="x", holdout=0.1, test_split=None),
    ):
        assert type(settings).model_validate(settings.model_dump()) == settings


def test_a_number_may_name_a_subset() -> None:
    assert GenerationSettings.model_validate({"data": "facts", "subset": 300}).subset == "300"


def test_one_word_cannot_be_permuted() -> None:
    with pytest.raises(ValidationError, match="greater than or equal to 2"):
        LanguageModellingSettings(data="x", permute_words=1)


def test_every_known_default_is_a_setting() -> None:
    keys = set(ClassificationSettings.model_fields) | set(GenerationSettings.model_fields)
    assert {key for known in KNOWN.values() for key in known.defaults} <= keys


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"holdout": 0.1, "validation_split": "dev"}, "either a validation split or the fraction"),
        ({"validation_split": None}, "either a validation split or the fraction"),
        ({"validation_split": "train"}, "hold a part out instead"),
        ({"test_split": "train"}, "are both 'train': name two splits"),
        ({"holdout": 1.5}, "less than 1"),
        ({"template": "{"}, "braces do not match"),
        ({"max_train": 0}, "greater than or equal to 1"),
        ({"temlate": "{text}"}, "Extra inputs"),
    ],
)
def test_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ClassificationSettings(data="x", **given)
