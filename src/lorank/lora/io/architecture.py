"""A base model without its weights: the modules and parameters that its configuration describes.

An adapter's file tells the wrappers of a module's parameters apart by their depth only. Which parameter is which, and
how many experts it has, is known from the architecture. Every weight is one zero, repeated without memory.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lorank.errors import AdapterError

_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "FEATURE_EXTRACTION": "AutoModel",
}


def architecture_of(name: str | None, task: str | None, dtype: torch.dtype) -> nn.Module:
    """The base model that an adapter names, without weights. Only its configuration is read.

    Args:
        name: ``base_model_name_or_path`` of the adapter.
        task: ``task_type`` of the adapter.
        dtype: the type of the weights.

    Raises:
        AdapterError: the adapter names no base model, or its configuration cannot be read.
    """
    import transformers

    try:
        if not name:
            raise ValueError("the adapter names no base model")
        config = transformers.AutoConfig.from_pretrained(name)
        kind: Any = getattr(transformers, _CLASSES.get(task or "", ""), None)
        with torch.device("meta"):
            if kind is not None:
                model: nn.Module = kind.from_config(config)
            else:
                model = getattr(transformers, config.architectures[0])(config)
    except Exception as error:  # transformers raises many kinds
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
        raise AdapterError(
            "the adapter has target_parameters, which cannot be understood without the architecture of its base model, "
            f"and {name!r} cannot be read: {reason}. Load the adapter onto its base model, and use "
            "lorank.resize_adapter_(model, …)"
        ) from error
    for module in model.modules():
        for name_of, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name_of] = nn.Parameter(_zeros(parameter, dtype), requires_grad=False)
        for name_of, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name_of] = _zeros(buffer, dtype)
    return model


def _zeros(like: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros((), dtype=dtype if like.is_floating_point() else like.dtype).expand(like.shape)
