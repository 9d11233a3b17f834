"""The batch that ranks are scored on, and the model's own loss on it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lorank.errors import ValidationBatchError

LossFn = Callable[[nn.Module, Mapping[str, Any]], Tensor]
IGNORED = -100  # the label that cross-entropy ignores, in PyTorch and in transformers


def unwrap_model(model: nn.Module) -> nn.Module:
    """The model inside ``torch.compile`` and ``DistributedDataParallel``.

    Scoring needs neither. A compiled model would be compiled again for every variant. A distributed model would wait
    for processes that may not be scoring.
    """
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def base_of(model: nn.Module) -> nn.Module:
    """The transformers model inside a ``PeftModel``, or the model itself."""
    get_base_model = getattr(model, "get_base_model", None)
    inner = get_base_model() if callable(get_base_model) else model
    return inner if isinstance(inner, nn.Module) else model


def prepare_batch(model: nn.Module, batch: Mapping[str, Any], *, needs_labels: bool) -> dict[str, Any]:
    """The batch on the model's device, checked.

    Args:
        batch: name → tensor; with the user's own loss function, values may be anything.
        needs_labels: whether labels are required: False with the user's own loss function.

    Raises:
        ValidationBatchError: not a mapping of tensors, empty, or without any label.
    """
    if not isinstance(batch, Mapping):
        raise ValidationBatchError(
            f"the validation batch is a {type(batch).__name__}; expected a mapping from argument names of the model's "
            "forward to tensors, e.g. {'input_ids': …, 'labels': …}. Take one batch from the data loader"
        )
    values: dict[str, Any] = {key: value for key, value in batch.items() if value is not None}
    if not values:
        raise ValidationBatchError(
            "the validation batch is empty: expected tensors such as input_ids and labels. Give it at least one sample"
        )
    for key, value in values.items():
        if not isinstance(value, Tensor):
            if needs_labels:
                raise ValidationBatchError(
                    f"the validation batch's {key!r} is a {type(value).__name__}; expected a tensor. Use the data "
                    "collator that training uses, or pass loss_fn to handle such a batch"
                )
        elif value.dim() and value.shape[0] == 0:
            raise ValidationBatchError(
                f"the validation batch's {key!r} has shape {tuple(value.shape)}: there is no sample in it. Give it at "
                "least one sample"
            )
    labels = values.get("labels")
    if needs_labels and isinstance(labels, Tensor) and bool((labels == IGNORED).all()):
        raise ValidationBatchError(
            f"all {labels.numel()} labels of the validation batch are {IGNORED}, so the loss ignores every position "
            "and ranks cannot be scored. Give a label to at least one position; check that neither the prompt's mask "
            "nor the truncation removes the answers"
        )
    device = next((p.device for p in model.parameters() if p.device.type != "meta"), None)
    return {
        key: value.to(device) if isinstance(value, Tensor) and device is not None else value
        for key, value in values.items()
    }


def forward_arguments(model: nn.Module) -> dict[str, Any]:
    """Arguments added to every forward pass: ``use_cache=False``, if the model has a cache of keys and values."""
    parameters = inspect.signature(base_of(model).forward).parameters
    return {"use_cache": False} if "use_cache" in parameters else {}


def field(output: Any, name: str) -> Any:
    """A field of a model's output, or None."""
    return output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)


def detached_loss(model: nn.Module, batch: Mapping[str, Any], loss_fn: LossFn | None) -> Tensor:
    """The loss as training computes it, without its graph: ``loss_fn(model, batch)``, or ``model(**batch).loss``.

    Raises:
        ValidationBatchError: there is no loss, or it is not one number.
    """
    if loss_fn is not None:
        loss, source = loss_fn(model, batch), "loss_fn"
    else:
        output = model(**forward_arguments(model), **batch)
        loss, source = field(output, "loss"), "the model"
        if loss is None and isinstance(output, tuple) and "labels" in batch:
            loss = output[0]
    if loss is None:
        raise ValidationBatchError(
            f"{source} returned no loss for a validation batch with {', '.join(batch)}. Add labels to it, under the "
            "name that the model's forward expects, or pass loss_fn"
        )
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        what = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise ValidationBatchError(f"{source} returned a loss of {what}; expected one number, the mean over the batch")
    return loss.detach()


def require_finite(loss: Tensor | float, what: str) -> float:
    """The loss as a float.

    Args:
        what: the variant of the model, for the message.

    Raises:
        ValidationBatchError: the loss is NaN or infinite.
    """
    value = float(loss)
    if not torch.isfinite(torch.tensor(value, dtype=torch.float64)):
        raise ValidationBatchError(
            f"the loss of {what} on the validation batch is {value}, so its ranks cannot be ordered. Check that the "
            "weights are finite (training may have diverged), that at least one label is not ignored, and, in float16, "
            "that no value overflows"
        )
    return value


def loss_with_graph(model: nn.Module, batch: Mapping[str, Any], loss_fn: LossFn | None) -> Tensor:
    """The loss as training computes it, with its graph for a backward pass.

    Raises:
        ValidationBatchError: there is no loss, it is not one number, or it does not depend on the adapter.
    """
    loss = loss_fn(model, batch) if loss_fn is not None else field(model(**forward_arguments(model), **batch), "loss")
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
        what = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) and loss.numel() != 1 else "no gradient"
        what = what if isinstance(loss, Tensor) else type(loss).__name__
        raise ValidationBatchError(
            f"the loss on a batch with {', '.join(batch)} is {what}; expected one number that depends on the adapter. "
            "Give labels under the name that the model's forward expects, or pass loss_fn"
        )
    return loss
