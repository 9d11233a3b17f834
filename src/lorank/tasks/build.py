"""Makes the task of a configuration."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from lorank.tasks.base import Task
from lorank.tasks.classification import ClassificationTask
from lorank.tasks.errors import DataError
from lorank.tasks.generation import GenerationTask
from lorank.tasks.image_classification import ImageClassificationTask
from lorank.tasks.language_modelling import LanguageModellingTask
from lorank.tasks.settings import (
    ClassificationSettings,
    GenerationSettings,
    ImageClassificationSettings,
    LanguageModellingSettings,
    TaskSettings,
)


def build_task(settings: TaskSettings, tokenizer: PreTrainedTokenizerBase | None) -> Task:
    """Makes the task of these settings; reads and encodes its training and validation examples.

    Args:
        settings: the task.
        tokenizer: the model's; None for a task without text.

    Raises:
        DataError: the data set, a split or a column does not exist, is empty, or does not fit the task.
        MissingPackageError: the data set is part of a package that is not installed.
    """
    if isinstance(settings, ImageClassificationSettings):
        return ImageClassificationTask(settings)
    if tokenizer is None:
        raise DataError(f"The task {settings.name} needs a tokenizer, and got none: give the model's own.")
    match settings:
        case ClassificationSettings():
            return ClassificationTask(settings, tokenizer)
        case GenerationSettings():
            return GenerationTask(settings, tokenizer)
        case LanguageModellingSettings():
            return LanguageModellingTask(settings, tokenizer)
