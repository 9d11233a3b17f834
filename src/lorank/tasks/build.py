"""Makes the task of a configuration."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from lorank.tasks.base import Task
from lorank.tasks.classification import ClassificationTask
from lorank.tasks.generation import GenerationTask
from lorank.tasks.language_modelling import LanguageModellingTask
from lorank.tasks.settings import ClassificationSettings, GenerationSettings, LanguageModellingSettings, TaskSettings


def build_task(settings: TaskSettings, tokenizer: PreTrainedTokenizerBase) -> Task:
    """Makes the task of these settings; reads and encodes its training and validation examples.

    Raises:
        DataError: the data set, a split or a column does not exist, is empty, or does not fit the task.
    """
    match settings:
        case ClassificationSettings():
            return ClassificationTask(settings, tokenizer)
        case GenerationSettings():
            return GenerationTask(settings, tokenizer)
        case LanguageModellingSettings():
            return LanguageModellingTask(settings, tokenizer)
