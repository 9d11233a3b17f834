"""Tasks: a data set, a prompt and a metric. Data come from the Hugging Face hub, files, or the folder LORANK_DATA."""

from transformers import PreTrainedTokenizerBase

from lorank.tasks.base import ModelKind, Split, Task, mean_loss
from lorank.tasks.classification import ClassificationTask
from lorank.tasks.collate import Collator, Example
from lorank.tasks.errors import DataError
from lorank.tasks.generation import GenerationTask, text_scores
from lorank.tasks.language_modelling import LanguageModellingTask, pack
from lorank.tasks.settings import (
    ClassificationSettings,
    GenerationSettings,
    LanguageModellingSettings,
    TaskSettings,
)
from lorank.tasks.sources import load_rows

__all__ = [
    "ClassificationSettings",
    "ClassificationTask",
    "Collator",
    "DataError",
    "Example",
    "GenerationSettings",
    "GenerationTask",
    "LanguageModellingSettings",
    "LanguageModellingTask",
    "ModelKind",
    "Split",
    "Task",
    "TaskSettings",
    "build_task",
    "load_rows",
    "mean_loss",
    "pack",
    "text_scores",
]


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
