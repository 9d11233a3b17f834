"""Tasks: a data set, a prompt and a metric. Data come from the Hugging Face hub, files, or the folder LORANK_DATA."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lorank.lazy import lazy_attributes

if TYPE_CHECKING:
    from lorank.tasks.base import ModelKind, Split, Task, mean_loss
    from lorank.tasks.build import build_task
    from lorank.tasks.classification import ClassificationTask
    from lorank.tasks.collate import Collator, Example, ImageCollator
    from lorank.tasks.errors import DataError
    from lorank.tasks.generation import GenerationTask, text_scores
    from lorank.tasks.image_classification import ImageClassificationTask
    from lorank.tasks.language_modelling import LanguageModellingTask, pack
    from lorank.tasks.settings import (
        ClassificationSettings,
        GenerationSettings,
        ImageClassificationSettings,
        LanguageModellingSettings,
        TaskSettings,
    )
    from lorank.tasks.sources import load_rows

_HOMES = {
    "ClassificationSettings": "settings",
    "ClassificationTask": "classification",
    "Collator": "collate",
    "DataError": "errors",
    "Example": "collate",
    "GenerationSettings": "settings",
    "GenerationTask": "generation",
    "ImageClassificationSettings": "settings",
    "ImageClassificationTask": "image_classification",
    "ImageCollator": "collate",
    "LanguageModellingSettings": "settings",
    "LanguageModellingTask": "language_modelling",
    "ModelKind": "base",
    "Split": "base",
    "Task": "base",
    "TaskSettings": "settings",
    "build_task": "build",
    "load_rows": "sources",
    "mean_loss": "base",
    "pack": "language_modelling",
    "text_scores": "generation",
}

__all__ = [
    "ClassificationSettings",
    "ClassificationTask",
    "Collator",
    "DataError",
    "Example",
    "GenerationSettings",
    "GenerationTask",
    "ImageClassificationSettings",
    "ImageClassificationTask",
    "ImageCollator",
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

__getattr__, __dir__ = lazy_attributes(__name__, _HOMES)
