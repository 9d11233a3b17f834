"""The batch that ranks are scored on, and the model's own loss on it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lorank.errors import LorankError, ValidationBatchError

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
        batch: name → tensor, or number; with the user's own loss function, values may be anything.
        needs_labels: whether labels are required: False with the user's own loss function.

    Raises:
        ValidationBatchError: not a mapping of tensors and numbers, empty, or without any label.
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
            # Collators of packed rows add lengths as plain numbers. Such a batch is never split or repeated.
            if needs_labels and (key == "labels" or not isinstance(value, int | float)):
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


def loss_of(output: Any, batch: Mapping[str, Any]) -> Any:
    """The loss in a model's output, or None: the field ``loss``; the first value of a tuple; or the output itself.

    Without ``labels`` in the batch, the first value of a tuple is taken for a loss only if it is a scalar, because it
    may also be the logits.
    """
    if isinstance(output, Tensor):
        return output if output.dim() == 0 else None
    loss = field(output, "loss")
    if loss is None and _is_sequence(output) and ("labels" in batch or _is_scalar(output[0])):
        return output[0]
    return loss


def logits_of(output: Any) -> Any:
    """The logits in a model's output, or None: the field ``logits``, or the first value of a tuple after the loss."""
    logits = field(output, "logits")
    if logits is None and _is_sequence(output):
        rest = output[1:] if _is_scalar(output[0]) else output
        return rest[0] if rest else None
    return logits


def _is_sequence(output: Any) -> bool:
    return isinstance(output, tuple | list) and len(output) > 0


def _is_scalar(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() == 0


def model_loss(model: nn.Module, batch: Mapping[str, Any], loss_fn: LossFn | None) -> Tensor:
    """The loss as training computes it: ``loss_fn(model, batch)``, or the loss that ``model(**batch)`` returns.

    Raises:
        ValidationBatchError: the model or ``loss_fn`` raised an error, there is no loss, or it is not one number.
    """
    source = "the model" if loss_fn is None else "loss_fn"
    names = ", ".join(map(str, batch))
    with model_errors_explained(f"{source} raised", f"on a validation batch with {names}"):
        if loss_fn is not None:
            loss = loss_fn(model, batch)
        else:
            loss = loss_of(model(**forward_arguments(model), **batch), batch)
    if loss is None:
        raise ValidationBatchError(
            f"{source} returned no loss for a validation batch with {names}, in evaluation mode. Add labels to it, "
            "under the name that the model's forward expects, or pass loss_fn"
        )
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        what = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise ValidationBatchError(f"{source} returned a loss of {what}; expected one number, the mean over the batch")
    return loss


@contextmanager
def model_errors_explained(did: str, where: str) -> Iterator[None]:
    """Turns an error of the user's model or loss function into a ValidationBatchError that says where it came from.

    Lorank's own errors and a lack of memory keep their type.
    """
    try:
        yield
    except (LorankError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a model or a loss function of the user's may raise anything
        raise ValidationBatchError(
            f"{did} {type(error).__name__} {where}: {error}. Ranks are scored in evaluation mode, on the batch as it "
            "is given: give a batch with which model(**batch) gives a loss as in training, or pass loss_fn"
        ) from error


def detached_loss(model: nn.Module, batch: Mapping[str, Any], loss_fn: LossFn | None) -> Tensor:
    """The loss as training computes it, without its graph.

    Raises:
        ValidationBatchError: see :func:`model_loss`.
    """
    return model_loss(model, batch, loss_fn).detach()


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
        ValidationBatchError: see :func:`model_loss`; or the loss does not depend on the adapter.
    """
    loss = model_loss(model, batch, loss_fn)
    if not loss.requires_grad:
        source = "the model's loss" if loss_fn is None else "the loss that loss_fn returns"
        raise ValidationBatchError(
            f"{source} on a batch with {', '.join(map(str, batch))} has no gradient; expected one number that depends "
            "on the adapter. Compute it without torch.no_grad(), .item() or .detach()"
        )
    return loss


def loss_gradients(loss: Tensor, leaves: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    """∂L/∂leaf for each leaf; None for a leaf that the loss does not depend on. No ``.grad`` is written.

    Raises:
        ValidationBatchError: the backward pass raised an error.
    """
    with model_errors_explained("the backward pass through the model raised", "while ranks were scored"):
        return torch.autograd.grad(loss, leaves, allow_unused=True)
