"""What an export needs to know of the base model: its configuration, and the names and shapes of its modules.

Only the configuration is read. The modules are made on the meta device, without weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig
from transformers.pytorch_utils import Conv1D

from lorank.errors import AdapterError
from lorank.lora.export.adapter_file import AdapterFile

_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "FEATURE_EXTRACTION": "AutoModel",
}


@dataclass(frozen=True)
class BaseModule:
    """A linear map or an embedding of the base model.

    Attributes:
        d_in: number of inputs; of an embedding, number of embeddings.
        d_out: number of outputs; of an embedding, its width.
        is_embedding: whether it is an embedding.
    """

    d_in: int
    d_out: int
    is_embedding: bool = False


def base_config(adapter: AdapterFile, base: str | Path | None, *, download: bool = True) -> Any | None:
    """The configuration of the base model.

    Args:
        base: a folder or a hub name; None: the one that the adapter names.
        download: ask the hub for a name that is not in the cache.

    Returns:
        The configuration; None: there is none, and ``base`` was not given.

    Raises:
        AdapterError: ``base`` was given, and has no configuration.
    """
    name = str(base or adapter.config.base_model_name_or_path or "")
    if not name:
        return None
    try:
        return AutoConfig.from_pretrained(name, local_files_only=not download)
    except Exception as error:  # of many kinds: no folder, no network, a file that is no configuration
        if base is None:
            return None
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise AdapterError(
            f"the base model {name!r} has no configuration that can be read: {reason} Give a folder with config.json, "
            "or a name on the Hugging Face hub"
        ) from error


def base_modules(adapter: AdapterFile, config: Any | None) -> dict[str, BaseModule] | None:
    """The linear maps and embeddings of the base model by their names.

    Returns:
        None: the configuration is not known, or the model has other modules than the adapter names.
    """
    if config is None:
        return None
    for make in (model_class(adapter, config), *_other_classes(config)):
        try:
            with torch.device("meta"):
                model = make._from_config(config)
        except Exception:  # a class that cannot be made without its weights or its code
            continue
        found = {name: one for name, module in model.named_modules() if (one := _shape(module)) is not None}
        if set(adapter.updates) <= set(found):
            return found
    return None


def _other_classes(config: Any) -> list[Any]:
    """Classes in which the same modules may have other names, for a configuration that names no class."""
    mappings = [getattr(transformers, auto)._model_mapping for auto in ("AutoModelForCausalLM", "AutoModel")]
    return [mapping[type(config)] for mapping in mappings if type(config) in mapping]


def model_class(adapter: AdapterFile, config: Any) -> Any:
    """The class of transformers for the base model, by the adapter's task and the base model's configuration."""
    auto = _CLASSES.get(str(adapter.settings.get("task_type") or ""))
    if auto is not None:
        mapping = getattr(transformers, auto)._model_mapping
        if type(config) in mapping:
            found = mapping[type(config)]
            return found[0] if isinstance(found, tuple) else found
    named = (getattr(config, "architectures", None) or [""])[0]
    return getattr(transformers, named, None) or transformers.AutoModel._model_mapping[type(config)]


def _shape(module: nn.Module) -> BaseModule | None:
    if isinstance(module, nn.Embedding):
        return BaseModule(module.num_embeddings, module.embedding_dim, is_embedding=True)
    if isinstance(module, nn.Linear):
        return BaseModule(module.in_features, module.out_features)
    if isinstance(module, Conv1D):  # GPT-2's linear map, with W transposed
        return BaseModule(int(module.weight.shape[0]), int(module.weight.shape[1]))
    return None
